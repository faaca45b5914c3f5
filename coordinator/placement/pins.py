"""Which experts of a node's slice stay in a fast tier: those that the traffic asks for most. The rest moves by use.

A tier that is large enough for the whole slice needs no pins. In another, pins take a part only: which experts a text
asks for changes with its topic, and the node follows that by itself.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from moehive.kernels.geometry import LayerGeometry

from ..types import NodeName, Owners, Pins
from .native import Floats
from .traces import NO_EXPERT, Trace

PINNED_SHARE = 0.5  # of a tier, at most

Expert = tuple[int, int]  # layer, number


def pinned(
    owners: Owners, tiers: Mapping[NodeName, tuple[int, int]], layers: Sequence[LayerGeometry], trace: Trace
) -> dict[NodeName, Pins]:
    """The pins of each node that has any. `tiers`: the bytes of RAM and of a GPU's memory that a node gives."""
    uses = _uses(owners, trace)
    held: dict[NodeName, list[Expert]] = {}
    for layer, experts in enumerate(owners):
        for expert, names in enumerate(experts):
            for name in names:
                held.setdefault(name, []).append((layer, expert))
    found = {}
    for name, experts_here in held.items():
        ram, vram = tiers.get(name, (0, 0))
        size = {(layer, expert): layers[layer].spec_of(expert).nbytes for layer, expert in experts_here}
        wanted = [one for one in experts_here if uses[one[0]][one[1]]]
        wanted.sort(key=lambda one: (-uses[one[0]][one[1]] / size[one], one))
        in_vram = _take(wanted, size, vram)
        in_ram = _take([one for one in wanted if one not in in_vram], size, ram)
        if in_ram or in_vram:
            found[name] = Pins(_by_layer(in_ram, len(layers)), _by_layer(in_vram, len(layers)))
    return found


def covered(pins: Mapping[NodeName, Pins], owners: Owners, trace: Trace) -> float:
    """The share of all uses that a pinned expert serves; of an expert's holders each serves alike."""
    uses = _uses(owners, trace)
    kept = sum(
        float(uses[layer][list(experts)].sum())
        for tiers in pins.values()
        for tier in tiers
        for layer, experts in enumerate(tier)
    )
    return kept / float(sum((each * _holders(layer)).sum() for each, layer in zip(uses, owners, strict=True)))


def _take(experts: Sequence[Expert], size: Mapping[Expert, int], tier_bytes: int) -> set[Expert]:
    """The first of `experts` that fit into a tier's part for pins; none if the tier holds the whole slice."""
    if sum(size.values()) <= tier_bytes:
        return set()
    room = int(PINNED_SHARE * tier_bytes)
    taken = set()
    for one in experts:
        if size[one] <= room:
            taken.add(one)
            room -= size[one]
    return taken


def _uses(owners: Owners, trace: Trace) -> list[Floats]:
    """For each layer how often each expert is asked of each of its holders, f64 [experts]."""
    found = []
    for layer, experts in zip(owners, trace.experts, strict=True):
        counts = np.bincount(experts[experts != NO_EXPERT], minlength=len(layer))
        found.append(counts / _holders(layer))
    return found


def _holders(layer: Sequence[Sequence[NodeName]]) -> Floats:
    return np.array([len(names) for names in layer], dtype=np.float64)


def _by_layer(experts: set[Expert], layers: int) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in range(layers)]
    for layer, expert in sorted(experts):
        found[layer].append(expert)
    return tuple(map(tuple, found))
