"""How memory is shared out over the layers: how many experts of each layer each place may hold."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..types import CoordinatorError
from .cluster import Cluster

Slots = npt.NDArray[np.int32]  # [layers, places]


def share_out(cluster: Cluster, experts: Sequence[int], local: tuple[int, frozenset[int]] | None = None) -> Slots:
    """Every layer gets the same part of every place's memory, as nearly as whole experts allow.

    `experts` are those of each layer. `local` is a place and layers that it holds whole; they take nothing elsewhere
    unless something is left over. Raises CoordinatorError with the bytes that are missing when the model does not
    fit.
    """
    count = len(experts)
    sizes = np.array([cluster.bytes_of(layer) for layer in range(count)], dtype=np.int64)
    need = np.asarray(experts, dtype=np.int64)
    memory = np.array([place.mem_bytes for place in cluster.places], dtype=np.int64)
    slots = np.zeros((count, len(memory)), dtype=np.int64)
    whole = np.zeros(count, dtype=np.bool_)
    if local is not None:
        whole[list(local[1])] = True
        slots[whole, local[0]] = need[whole]
    for part in (~whole, whole):
        left = memory - sizes @ slots
        total = int((sizes * need)[part].sum())
        if total:
            slots[part] += (need[part, None] * np.minimum(1.0, left / total)).astype(np.int64)
            np.minimum(slots, need[:, None], out=slots)
            _hand_out_rest(slots, memory, sizes, need, part)
    _mend(slots, memory, sizes, need)
    missing = int((np.maximum(0, need - slots.sum(axis=1)) * sizes).sum())
    if missing:
        machines = "The machine gives" if len(cluster.nodes) == 1 else f"The {len(cluster.nodes)} machines give"
        raise CoordinatorError(
            f"{machines} {amount(int(memory.sum()))} of memory and the experts need {amount(int(sizes @ need))}: "
            f"room for {amount(missing)} is missing. Start another node or give more memory."
        )
    return slots.astype(np.int32)


def _hand_out_rest(
    slots: npt.NDArray[np.int64],
    memory: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    need: npt.NDArray[np.int64],
    part: npt.NDArray[np.bool_],
) -> None:
    """What rounding left over, one slot at a time, to the layers that have least room for their experts."""
    for place in range(len(memory)):
        left = int(memory[place] - sizes @ slots[:, place])
        for _ in range(2):  # a slot for each layer at most is left by rounding; twice, since sizes may differ
            room = slots.sum(axis=1) - need
            for layer in np.lexsort((np.arange(len(need)), room)):
                if part[layer] and slots[layer, place] < need[layer] and sizes[layer] <= left:
                    slots[layer, place] += 1
                    left -= int(sizes[layer])


def _mend(
    slots: npt.NDArray[np.int64],
    memory: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    need: npt.NDArray[np.int64],
) -> None:
    """Takes slots from layers with room to spare for layers that lack some."""
    free = memory - sizes @ slots
    for layer in np.flatnonzero(slots.sum(axis=1) < need):
        for _ in range(int(need[layer] - slots[layer].sum())):
            for place in np.argsort(-free, kind="stable"):
                if slots[layer, place] >= need[layer]:
                    continue
                spare = np.flatnonzero((slots.sum(axis=1) > need) & (slots[:, place] > 0))
                while free[place] < sizes[layer] and len(spare):
                    slots[spare[0], place] -= 1
                    free[place] += sizes[spare[0]]
                    spare = np.flatnonzero((slots.sum(axis=1) > need) & (slots[:, place] > 0))
                if free[place] >= sizes[layer]:
                    slots[layer, place] += 1
                    free[place] -= sizes[layer]
                    break


def amount(count: int) -> str:
    """Bytes for a person, with three digits."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} bytes"
