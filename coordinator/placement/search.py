"""One layer's search: a first plan from mean loads, then simulated annealing on exact makespans."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .cluster import Cluster
from .makespan import layer_costs, popularity
from .native import Floats, LayerCosts, Replicas, Search, anneal, makespans
from .start import first_plan
from .traces import Batches, Each, Mix, Trace, sample

FIT_BATCHES = {1: 64_000, 4: 16_000, 16: 8_000, 64: 200}  # of each kind, by its tokens
MOST_USES = 4  # of a token in batches of a kind: more of them say little that is new
MOVES = 4_200_000  # of all layers together: 60 layers of 512 experts on 8 nodes take a minute on two cores in all
MOST_MOVES = 150_000  # of one layer; little is gained beyond


class Stage(NamedTuple):
    """A part of a search; temperatures are parts of the cost."""

    batches: int | None  # how many it looks at; None: at all
    moves: float  # share of the moves
    hot: float
    cold: float


# Few batches show where most experts belong; all of them, what is true of other tokens too.
STAGES = (Stage(4_000, 0.6, 2e-4, 5e-5), Stage(None, 0.4, 5e-5, 6e-6))


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the problem: what it costs and what it is fitted to."""

    costs: LayerCosts
    batches: Batches
    weight: Floats  # [batches]; the plan's cost is the sum of weight × makespan
    load: Floats  # [experts]: mean hits a batch
    pinned: Replicas
    present: Replicas  # where experts are now; all where nothing is


def prepare(
    cluster: Cluster, trace: Trace, experts: int, mixes: Sequence[Mix], seed: int,
    present: Sequence[Replicas] | None, each: Each,
) -> list[Layer]:  # fmt: skip
    """The layers of a trace, each kind of batch counting the same; `weight` has to be scaled by `weigh`."""
    counts = []
    for mix in mixes:
        enough = max(1, MOST_USES * trace.tokens // mix.tokens) if mix.tokens > 1 else trace.tokens
        counts.append(min(enough, next((n for most, n in FIT_BATCHES.items() if mix.tokens <= most), 100)))
    batches = sample(trace, mixes, counts, seed, each)
    kinds = batches[0].mix  # the same in all layers
    weight = (1.0 / len(mixes)) / np.bincount(kinds, minlength=len(mixes))[kinds]
    middle = len(mixes) // 2
    heat = (kinds == middle) / counts[middle]

    def layer(index: int) -> Layer:
        load = popularity(batches[index].hits, heat, batches[index].offsets, experts)
        there = present[index] if present is not None else np.zeros(experts, dtype=np.uint64)
        pinned = _pinned(cluster, index, experts)
        return Layer(layer_costs(cluster, index, mixes), batches[index], weight, load, pinned, there)

    return each(layer, range(trace.layers))


def _pinned(cluster: Cluster, layer: int, experts: int) -> Replicas:
    pinned = np.zeros(experts, dtype=np.uint64)
    for bit, place in enumerate(cluster.places):
        if place.tier == 0:
            for at, expert in cluster.nodes[place.node].pinned:
                if at == layer and expert < experts:
                    pinned[expert] |= np.uint64(1) << np.uint64(bit)
    return pinned


def moves_for(layers: int) -> int:
    """Moves of each layer's search."""
    return min(MOST_MOVES, MOVES // layers)


def begin(layer: Layer, slots: npt.NDArray[np.int32]) -> Replicas:
    """A first plan; what is there now stays where it is, as far as the slots allow."""
    kept = layer.pinned.copy()
    if layer.present.any():
        for place in range(len(slots)):
            bit = np.uint64(1) << np.uint64(place)
            here = np.flatnonzero(layer.present & ~kept & bit)
            room = int(slots[place]) - int(np.count_nonzero(kept & bit))
            kept[here[np.argsort(-layer.load[here], kind="stable")][: max(0, room)]] |= bit
        _make_room(kept, layer, slots)
    return first_plan(layer.load, layer.costs.fixed.mean(axis=0), layer.costs.step, slots, kept)


def _make_room(kept: Replicas, layer: Layer, slots: npt.NDArray[np.int32]) -> None:
    """Drops replicas, cold ones first, until each expert that is nowhere has a slot."""
    lacking = int(np.count_nonzero(kept == 0))
    held = sum(int(np.count_nonzero(kept >> np.uint64(p) & np.uint64(1))) for p in range(len(slots)))
    for expert in np.argsort(layer.load, kind="stable"):
        for place in reversed(range(len(slots))):
            if int(slots.sum()) - held >= lacking:
                return
            bit = np.uint64(1) << np.uint64(place)
            if kept[expert] & bit & ~layer.pinned[expert] and np.bitwise_count(kept[expert]) > 1:
                kept[expert] &= ~bit
                held -= 1


def improve(
    layer: Layer, slots: npt.NDArray[np.int32], first: Replicas, moves: int, seed: int, copy_cost: float = 0.0
) -> tuple[Replicas, float]:
    """The annealed plan and its cost. `copy_cost`, in units of the cost, is that of each new replica."""
    plan, cost = first, 0.0
    for number, stage in enumerate(STAGES):
        batches, weight = _some(layer, stage.batches)
        search = Search(
            slots, layer.pinned, layer.present, copy_cost, int(stage.moves * moves), seed + 7919 * number,
            stage.hot, stage.cold,
        )  # fmt: skip
        plan, cost = anneal(layer.costs, batches, weight, plan, search)
    return plan, cost


def _some(layer: Layer, most: int | None) -> tuple[Batches, Floats]:
    """The first of a layer's batches, a fair sample, and weights with which each kind counts as it does among all."""
    batches = layer.batches
    if most is None or most >= len(batches.mix):
        return batches, layer.weight
    kinds = np.bincount(batches.mix, weights=layer.weight)
    some = batches.mix[:most]
    part = np.bincount(some, weights=layer.weight[:most], minlength=len(kinds))
    weight = layer.weight[:most] * (kinds / np.maximum(part, 1e-300))[some]
    return Batches(batches.offsets[: most + 1], batches.hits[: batches.offsets[most]], some), weight


def by_mix(layer: LayerCosts, batches: Batches, replicas: Replicas, mixes: int) -> Floats:
    """Mean makespan of each kind of batch [mixes], seconds."""
    times = makespans(layer, batches, replicas)
    return np.bincount(batches.mix, weights=times, minlength=mixes) / np.bincount(batches.mix, minlength=mixes)
