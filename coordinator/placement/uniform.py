"""The plan for traffic that is not known: each expert once, as if all of a layer's were used alike.

Under uniform routing experts differ in nothing but their place, so a plan is how many of a layer each place holds. A
place is done with a batch after its round trip and what it is expected to read; experts go, one after the other,
where the layer would end earliest with them. There are no replicas: loading them would only make the first start
longer, and which experts are worth one is seen in the traffic.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain

from moehive.kernels.geometry import LayerGeometry

from ..types import NodeName, Plan
from .cluster import Cluster
from .makespan import layer_costs
from .slots import Slots
from .traces import DEFAULT_MIXES

MIX = DEFAULT_MIXES[len(DEFAULT_MIXES) // 2]  # the batch that is evened out for; the others lose little

LayerOwners = tuple[tuple[NodeName, ...], ...]  # of one layer: for each expert the nodes that hold it


def uniform_plan(
    cluster: Cluster,
    slots: Slots,
    capacities: Mapping[NodeName, int],
    layers: Sequence[LayerGeometry],
    epoch: int,
    previous: Plan | None = None,
) -> Plan:
    """A plan within `slots` [layers, places], which must suffice for each layer.

    With a `previous` plan for the same layers, experts stay where they are as far as the new shares allow, and no
    node needs more than its `capacities` (bytes) while it holds what both plans give it. Where such shares don't
    exist, only what has lost its node moves. Should even that have no room, a node will say so when it loads.
    """
    old: Sequence[LayerOwners] = previous.owners if previous is not None else [()] * len(layers)
    spare = _spare(capacities, layers, old)
    for trial in (
        _Trial(cluster, layers, capacities, old, slots, spare),
        _Trial(cluster, layers, capacities, old, None, spare),
        _Trial(cluster, layers, capacities, old, slots, None),
    ):
        counts = trial.counts()
        if counts is not None:
            owners = (_assign(layer.experts, c, now) for layer, c, now in zip(layers, counts, old, strict=True))
            return Plan(epoch, tuple(owners))
    raise AssertionError("the slots do not suffice for the layers")


@dataclass(frozen=True, slots=True)
class _Trial:
    """How many experts of each layer each node may get, under some bounds."""

    cluster: Cluster
    layers: Sequence[LayerGeometry]
    capacities: Mapping[NodeName, int]  # bytes
    old: Sequence[LayerOwners]  # of each layer, by the plan before; empty: there is none
    slots: Slots | None  # [layers, places] that a place may hold; None: what has a node stays there
    spare: Mapping[NodeName, int] | None  # bytes that a node may load beyond what it holds; None: any

    def counts(self) -> list[Counter[NodeName]] | None:
        """Of each layer; None when there is no room within the bounds."""
        free = dict(self.capacities)
        spare = dict(self.spare) if self.spare is not None else None
        found: list[Counter[NodeName]] = [Counter() for _ in self.layers]
        # Layers of large experts first: small ones fill what is left.
        for index in sorted(range(len(found)), key=lambda i: (-self.layers[i].expert_bytes, i)):
            size, counts = self.layers[index].expert_bytes, found[index]
            held = Counter(chain.from_iterable(self.old[index]))
            room = {name: left // size for name, left in free.items()}
            if spare is not None:
                room = {name: min(most, held[name] + spare[name] // size) for name, most in room.items()}
            if self.slots is None:
                self._keep(index, room, counts)
            if not self._fill(index, room, free, counts):
                return None
            for name, count in counts.items():
                free[name] -= count * size
                if spare is not None:
                    spare[name] -= max(0, count - held[name]) * size
        return found

    def _keep(self, index: int, room: Mapping[NodeName, int], counts: Counter[NodeName]) -> None:
        for nodes in self.old[index]:
            node = next((n for n in nodes if counts[n] < room.get(n, 0)), None)
            if node is not None:
                counts[node] += 1

    def _fill(
        self, index: int, room: Mapping[NodeName, int], free: Mapping[NodeName, int], counts: Counter[NodeName]
    ) -> bool:
        """Adds the rest of a layer's experts, each where it ends earliest; False when there is no room for all."""
        layer, places = self.layers[index], self.cluster.places
        names = [NodeName(self.cluster.nodes[place.node].name) for place in places]
        costs = layer_costs(self.cluster, index, (MIX,))
        load = 1 - (1 - layer.top_k / layer.experts) ** MIX.tokens  # mean hits a batch of one expert
        fixed, step = costs.fixed[0].tolist(), (load * costs.step).tolist()
        limits = [layer.experts] * len(places) if self.slots is None else self.slots[index].tolist()
        here = [counts[name] if place.tier == 0 else 0 for name, place in zip(names, places, strict=True)]
        # Among those that end at the same time, who has most memory left: so what rounding takes goes round.
        line = [(fixed[p] + step[p] * (here[p] + 1), -free[name], p) for p, name in enumerate(names)]
        heapify(line)
        left = layer.experts - counts.total()
        while left and line:
            _, memory, place = heappop(line)
            if here[place] >= limits[place] or counts[names[place]] >= room[names[place]]:
                continue
            here[place] += 1
            counts[names[place]] += 1
            left -= 1
            heappush(line, (fixed[place] + step[place] * (here[place] + 1), memory, place))
        return not left


def _spare(
    capacities: Mapping[NodeName, int], layers: Sequence[LayerGeometry], old: Sequence[LayerOwners]
) -> dict[NodeName, int]:
    """Bytes that each node has beyond what it holds already."""
    spare = dict(capacities)
    for layer, owners in zip(layers, old, strict=True):
        for node, held in Counter(chain.from_iterable(owners)).items():
            if node in spare:
                spare[node] -= held * layer.expert_bytes
    return {node: max(0, size) for node, size in spare.items()}


def _assign(experts: int, counts: Mapping[NodeName, int], old: LayerOwners) -> LayerOwners:
    """Which experts each node gets: those that it has, as far as its count goes, then the rest in order."""
    left = dict(counts)
    chosen: list[NodeName | None] = [None] * experts
    for expert, holders in enumerate(old):
        node = next((holder for holder in holders if left.get(holder, 0) > 0), None)
        if node is not None:
            chosen[expert] = node
            left[node] -= 1
    fill = iter([node for node, count in sorted(left.items()) for _ in range(count)])
    return tuple((node if node is not None else next(fill),) for node in chosen)
