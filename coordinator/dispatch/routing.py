"""A layer's routing, split by node: which tokens go where, with which experts and weights. Plain numpy."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from moehive.proto.tensors import Routing


class Share(NamedTuple):
    """One node's part of a layer."""

    tokens: npt.NDArray[np.int64]  # [rows]: which of the layer's tokens, ascending
    pairs: npt.NDArray[np.int64]  # [pairs]: where each pair stands in the layer's flat [tokens * k]
    routing: Routing  # offsets over `tokens`


Owner: TypeAlias = npt.NDArray[np.int64] | Sequence[int]  # [experts], a node's index for each


def split(ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], owner: Owner) -> dict[int, Share]:
    """Splits `ids` and `weights` [tokens, k] by `owner`; for one token a list of owners is quicker than an array.

    Ids outside the experts mean none (some families pad their top-k). Nodes come in ascending order, tokens and
    pairs in theirs: the same input gives the same messages.
    """
    tokens, k = ids.shape
    if tokens == 1:
        return _split_one(ids[0].tolist(), weights[0], owner)
    owner = np.asarray(owner)
    flat = ids.reshape(-1)
    positions = np.arange(flat.size)
    valid = (flat >= 0) & (flat < owner.size)
    if not valid.all():
        positions, flat = positions[valid], flat[valid]
    nodes = owner[flat]
    order = np.argsort(nodes, kind="stable")
    positions, nodes = positions[order], nodes[order]
    present, starts = np.unique(nodes, return_index=True)
    all_weights = weights.reshape(-1)
    shares: dict[int, Share] = {}
    for node, start, end in zip(present, starts, np.append(starts, nodes.size)[1:], strict=True):
        pairs = positions[start:end]
        rows, counts = np.unique(pairs // k, return_counts=True)
        offsets = np.zeros(rows.size + 1, dtype=np.uint32)
        np.cumsum(counts, out=offsets[1:])
        experts = ids.reshape(-1)[pairs].astype(np.uint32)
        shares[int(node)] = Share(rows, pairs, Routing(offsets, experts, all_weights[pairs]))
    return shares


_ONE = np.zeros(1, dtype=np.int64)  # the only token of a decode step


def _split_one(ids: list[int], weights: npt.NDArray[np.float32], owner: Owner) -> dict[int, Share]:
    """`split` for one token, the case of every decode step: lists are quicker than arrays of so few."""
    places: dict[int, list[int]] = {}
    experts_in_all = len(owner)
    for place, expert in enumerate(ids):
        if 0 <= expert < experts_in_all:
            places.setdefault(int(owner[expert]), []).append(place)
    shares: dict[int, Share] = {}
    for node in sorted(places):
        pairs = np.array(places[node], dtype=np.int64)
        numbers = np.array([0, len(pairs), *(ids[place] for place in places[node])], dtype=np.uint32)
        shares[node] = Share(_ONE, pairs, Routing(numbers[:2], numbers[2:], weights[pairs]))
    return shares


def only(ids: npt.NDArray[np.int64], shares: Sequence[Share]) -> npt.NDArray[np.int64]:
    """`ids` [tokens, k] with none (-1) in place of all pairs that are in no share."""
    kept = np.full(ids.shape, -1, dtype=ids.dtype)  # in rows, however `ids` lies in memory
    for share in shares:
        kept.reshape(-1)[share.pairs] = ids.reshape(-1)[share.pairs]
    return kept


def pieces(
    ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], share: Share, experts: int
) -> Iterator[Share]:
    """`share`, a part of `ids` and `weights`, in shares of at most `experts` experts each."""
    mine = only(ids, [share])
    numbers = np.unique(mine[mine >= 0])
    for start in range(0, len(numbers), experts):
        piece = np.where(np.isin(mine, numbers[start : start + experts]), mine, -1)
        yield split(piece, weights, np.zeros(int(numbers[-1]) + 1, dtype=np.int64))[0]
