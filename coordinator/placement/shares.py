"""Placement by memory share: each layer's experts are split over the nodes as their memory is.

A pure function of its arguments, so the same inputs give the same plan. A layer's arithmetic runs on all nodes at
once, so every layer is split, not the model as a whole; what rounding gives a node too much in one layer is taken
off in the next. It does not know which experts are hot: it assumes that all are used alike.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from moehive.kernels.geometry import LayerGeometry

from ..types import CoordinatorError, NodeName, Plan
from .slots import amount

Owners = tuple[tuple[NodeName, ...], ...]  # of one layer: for each expert the nodes that hold it
Counts = dict[NodeName, int]  # of one layer: how many experts each node holds


def place_by_memory(
    capacities: Mapping[NodeName, int],
    layers: Sequence[LayerGeometry],
    epoch: int,
    previous: Plan | None = None,
) -> Plan:
    """A plan in which every expert has one owner and no node more than its bytes.

    `capacities` are the bytes that each node gives to experts. An expert stays where `previous`, a plan for the same
    layers, has it as far as the shares allow, and a node has room for what it holds by both plans, unless the experts
    fit in no such way. Raises CoordinatorError with the bytes that are missing when they don't fit at all.
    """
    given = {node: max(0, capacities[node]) for node in sorted(capacities)}
    held = [_count(owners) for owners in previous.owners] if previous else [Counter[NodeName]() for _ in layers]
    counts, missing = _split_layers(given, layers, held, _spare(given, layers, held))
    if missing and previous:
        counts, missing = _split_layers(given, layers, held, dict(given))
    if missing:
        total = sum(layer.nbytes for layer in layers)
        machines = "The machine gives" if len(given) == 1 else f"The {len(given)} machines give"
        raise CoordinatorError(
            f"{machines} {amount(sum(given.values()))} of memory and the experts need {amount(total)}: room for "
            f"{amount(missing)} is missing. Start another node or give more memory."
        )
    owners = [
        _assign(layer.experts, counts[index], previous.owners[index] if previous else None)
        for index, layer in enumerate(layers)
    ]
    return Plan(epoch, tuple(owners))


def _count(owners: Owners) -> Counter[NodeName]:
    return Counter(node for holders in owners for node in holders)


def _spare(
    given: Mapping[NodeName, int], layers: Sequence[LayerGeometry], held: Sequence[Counter[NodeName]]
) -> Counts:
    """Bytes that each node has beyond what it holds already."""
    spare = dict(given)
    for layer, counter in zip(layers, held, strict=True):
        for node in spare:
            spare[node] -= counter[node] * layer.expert_bytes
    return {node: max(0, size) for node, size in spare.items()}


def _split_layers(
    given: Mapping[NodeName, int],
    layers: Sequence[LayerGeometry],
    held: Sequence[Counter[NodeName]],
    spare: Counts,
) -> tuple[dict[int, Counts], int]:
    """How many experts each node gets in each layer, and the bytes for which there is no room.

    `spare` bounds what a node may get beyond its `held` experts of a layer; it is used up.
    """
    memory = sum(given.values())
    free = dict(given)
    # What each node's share of the layers so far comes to, less what it was given; times `memory`, in bytes, so that
    # it is a whole number.
    due = dict.fromkeys(given, 0)
    split: dict[int, Counts] = {}
    missing = 0
    # Layers of large experts first: small ones fill what is left.
    for index in sorted(range(len(layers)), key=lambda i: (-layers[i].expert_bytes, i)):
        experts, size = layers[index].experts, layers[index].expert_bytes
        for node in given:
            due[node] += given[node] * experts * size
        wanted = {node: due[node] / (memory * size) if memory else 0.0 for node in given}
        room = {node: min(free[node] // size, held[index][node] + spare[node] // size) for node in given}
        counts = split[index] = _split(experts, wanted, room)
        for node, count in counts.items():
            free[node] -= count * size
            spare[node] -= max(0, count - held[index][node]) * size
            due[node] -= count * size * memory
        missing += (experts - sum(counts.values())) * size
    return split, missing


def _split(experts: int, wanted: Mapping[NodeName, float], room: Mapping[NodeName, int]) -> Counts:
    """Whole experts for each node, as near to `wanted` as `room` allows; fewer than `experts` in all if need be.

    Each node gets its wanted number rounded down, then the largest remainders get one more, and so on.
    """
    counts = {node: min(room[node], max(0, int(wanted[node]))) for node in wanted}
    while sum(counts.values()) > experts:  # what is due from earlier layers may add up to more than this layer has
        node = max((n for n in counts if counts[n]), key=lambda n: counts[n] - wanted[n])
        counts[node] -= 1
    for _ in range(experts - sum(counts.values())):
        with_room = [node for node in counts if counts[node] < room[node]]
        if not with_room:
            break
        node = max(with_room, key=lambda n: wanted[n] - counts[n])  # the first by name among equals
        counts[node] += 1
    return counts


def _assign(experts: int, counts: Counts, previous: Owners | None) -> Owners:
    """Which experts each node gets: those that it has, as far as its count goes, then the rest in order."""
    left = dict(counts)
    chosen: list[NodeName | None] = [None] * experts
    for expert, holders in enumerate(previous or ()):
        node = next((holder for holder in holders if left.get(holder, 0) > 0), None)
        if node is not None:
            chosen[expert] = node
            left[node] -= 1
    fill = iter([node for node, count in left.items() for _ in range(count)])
    return tuple((node if node is not None else next(fill),) for node in chosen)
