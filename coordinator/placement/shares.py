"""Placement by memory share: each layer's experts are split over the nodes as their memory is.

A pure function of its arguments, so the same inputs give the same plan. A layer's arithmetic runs on all nodes at
once, so every layer is split, not the model as a whole; what rounding gives a node too much in one layer is taken
off in the next. It does not know which experts are hot: it assumes that all are used alike.
"""

from collections.abc import Mapping, Sequence

from moehive.kernels.geometry import LayerGeometry

from ..types import CoordinatorError, NodeName, Plan

Owners = tuple[tuple[NodeName, ...], ...]  # of one layer: for each expert the nodes that hold it


def place_by_memory(
    capacities: Mapping[NodeName, int],
    layers: Sequence[LayerGeometry],
    epoch: int,
    previous: Plan | None = None,
) -> Plan:
    """A plan in which every expert has one owner and no node more than its bytes.

    `capacities` are the bytes that each node gives to experts. An expert stays where `previous`, a plan for the same
    layers, has it as far as the shares allow, so that little is moved. Raises CoordinatorError with the bytes that
    are missing when the experts don't fit.
    """
    given = {node: max(0, capacities[node]) for node in sorted(capacities)}
    memory = sum(given.values())
    free = dict(given)
    # What each node's share of the layers placed so far comes to, less what it was given; times `memory`, in bytes,
    # so that it is a whole number.
    due = dict.fromkeys(given, 0)
    owners: dict[int, Owners] = {}
    missing = 0
    # Layers of large experts first: small ones fill what is left.
    for index in sorted(range(len(layers)), key=lambda i: (-layers[i].spec.nbytes, i)):
        experts, size = layers[index].experts, layers[index].spec.nbytes
        for node in given:
            due[node] += given[node] * experts * size
        wanted = {node: due[node] / (memory * size) if memory else 0.0 for node in given}
        counts = _split(experts, wanted, {node: free[node] // size for node in given})
        for node, count in counts.items():
            free[node] -= count * size
            due[node] -= count * size * memory
        missing += (experts - sum(counts.values())) * size
        if not missing:
            owners[index] = _assign(experts, counts, previous.owners[index] if previous else None)
    if missing:
        total = sum(layer.experts * layer.spec.nbytes for layer in layers)
        raise CoordinatorError(
            f"The experts need {gigabytes(total)} and the {len(given)} machines that are here give "
            f"{gigabytes(memory)}: room for {gigabytes(missing)} is missing. Start another node or give more memory."
        )
    return Plan(epoch, tuple(owners[index] for index in range(len(layers))))


def gigabytes(count: int) -> str:
    """Bytes for a person, rounded up so that a lack never reads as nothing."""
    return f"{-(-count // 10_000_000) / 100:,.2f} GB"


def _split(experts: int, wanted: Mapping[NodeName, float], room: Mapping[NodeName, int]) -> dict[NodeName, int]:
    """Whole experts for each node, as near to `wanted` as `room` allows; fewer than `experts` in all if need be.

    Each node gets its wanted number rounded down, then the largest remainders get one more, and so on.
    """
    counts = {node: min(room[node], max(0, int(wanted[node]))) for node in wanted}
    surplus = sum(counts.values()) - experts
    left = -surplus
    while surplus > 0:  # what earlier layers owe may add up to more than this layer has
        node = max(counts, key=lambda n: (counts[n] > 0, counts[n] - wanted[n], n))
        counts[node] -= 1
        surplus -= 1
    while left > 0:
        open_nodes = [node for node in counts if counts[node] < room[node]]
        if not open_nodes:
            break
        node = max(open_nodes, key=lambda n: wanted[n] - counts[n])  # the first by name among equals
        counts[node] += 1
        left -= 1
    return counts


def _assign(experts: int, counts: Mapping[NodeName, int], previous: Owners | None) -> Owners:
    """Which experts each node gets: those that it has, as far as its count goes, then the rest in order."""
    left = dict(counts)
    chosen: list[NodeName | None] = [None] * experts
    if previous is not None and len(previous) == experts:
        for expert, holders in enumerate(previous):
            for node in holders:
                if left.get(node, 0) > 0:
                    chosen[expert] = node
                    left[node] -= 1
                    break
    fill = iter([node for node, count in left.items() for _ in range(count)])
    return tuple((node if node is not None else next(fill),) for node in chosen)
