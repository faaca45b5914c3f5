"""The planner: from a cluster and a trace to a plan, its expected time and its lower bound. Pure and repeatable."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ..types import CoordinatorError
from .bound import lower_bounds
from .budget import budget
from .cluster import Cluster
from .makespan import layer_costs
from .native import Floats, Replicas, makespans
from .search import Layer, begin, by_mix, improve, moves_for, prepare
from .slots import Slots, share_out
from .traces import DEFAULT_MIXES, NO_EXPERT, Batches, Mix, Trace, in_pool, sample

SCORE_BATCHES = {1: 8_000, 4: 2000, 16: 500, 64: 200}  # held back, of each kind, by its tokens
MAX_EXPERTS = 4096  # of a layer; the bound looks at all pairs of them


@dataclass(frozen=True, slots=True)
class Placement:
    """A plan: for each layer, which places hold each expert, and how it scored on sequences held back."""

    cluster: Cluster
    mixes: tuple[Mix, ...]
    replicas: tuple[Replicas, ...]  # [layers][experts]: bits are places, cluster.places[bit]
    slots: Slots
    shared_at: tuple[int | None, ...]  # the place of each layer's shared expert; None: the coordinator computes it
    expected: Floats  # [layers, mixes] seconds, on held-back sequences
    bound: Floats  # [mixes] seconds of all layers: no plan is below
    bound_same_slots: Floats  # [mixes]: no plan that shares memory out over the layers as this one does is below

    @property
    def expected_s(self) -> float:
        """Seconds of all layers of one step, the kinds of batches counting the same."""
        return float(self.expected.sum(axis=0).mean())

    @property
    def bound_s(self) -> float:
        """A bound of `expected_s` that no plan is below."""
        return float(self.bound.mean())

    def holders(self, layer: int, expert: int) -> list[int]:
        """The nodes that hold an expert, the one to ask first in front."""
        bits = int(self.replicas[layer][expert])
        order = [place for place in _by_reach(self.cluster) if bits >> place & 1]
        return list(dict.fromkeys(self.cluster.places[place].node for place in order))


def make_plan(
    cluster: Cluster, trace: Trace, mixes: Sequence[Mix] = DEFAULT_MIXES, seed: int = 0, threads: int = 1,
    experts: int | None = None, effort: float = 1.0,
) -> Placement:  # fmt: skip
    """Plans for `trace`, minimizing the expected makespan.

    `experts` are those of a layer, where the trace may not hit all; `effort` scales the length of the search.

    Raises CoordinatorError, one sentence, when the model does not fit.
    """
    experts = experts or count_experts(trace)
    if experts > MAX_EXPERTS:
        raise CoordinatorError(f"The planner knows up to {MAX_EXPERTS:,} experts a layer, not {experts:,}.")
    if len(cluster.expert_bytes) not in (1, trace.layers):
        raise CoordinatorError(
            f"The cluster has expert_bytes for {len(cluster.expert_bytes)} layers and the trace has {trace.layers}."
        )
    fit, held = trace.split()
    with ThreadPoolExecutor(threads) as pool:
        each = in_pool(pool)
        layers = weigh(cluster, prepare(cluster, fit, experts, mixes, seed, None, each), experts, len(mixes))
        slots = budget(cluster, experts, layers, seed, each)
        moves = int(effort * moves_for(len(layers)))

        def solve(index: int) -> Replicas:
            first = begin(layers[index], slots[index])
            return improve(layers[index], slots[index], first, moves, seed + 1 + index)[0]

        replicas = each(solve, range(len(layers)))
        shared = each(
            lambda index: _place_shared(cluster, index, mixes, layers[index], replicas[index]), range(len(layers))
        )
    return score(cluster, mixes, replicas, slots, held, shared, seed, threads)


def score(
    cluster: Cluster, mixes: Sequence[Mix], replicas: Sequence[Replicas], slots: Slots, held: Trace,
    shared: Sequence[int | None], seed: int, threads: int,
) -> Placement:  # fmt: skip
    """A plan with its expected time and bounds on the batches of `held`."""
    scored = score_batches(held, mixes, seed)
    expected = np.stack(
        [
            by_mix(layer_costs(cluster, index, mixes, shared[index]), scored[index], chosen, len(mixes))
            for index, chosen in enumerate(replicas)
        ]
    )
    bounds = lower_bounds(cluster, mixes, scored, len(replicas[0]), slots, threads)
    return Placement(
        cluster, tuple(mixes), tuple(replicas), slots, tuple(shared), expected, bounds.any_plan, bounds.same_slots
    )


def score_batches(held: Trace, mixes: Sequence[Mix], seed: int) -> list[Batches]:
    """The batches of each layer that plans are scored on."""
    counts = [next((n for most, n in SCORE_BATCHES.items() if mix.tokens <= most), 100) for mix in mixes]
    # No token twice where batches are single tokens: the bound would take it for experts that are hit together.
    counts = [min(n, held.tokens) if mix.tokens == 1 else n for mix, n in zip(mixes, counts, strict=True)]
    return sample(held, mixes, counts, seed + 1_000_003)


def weigh(cluster: Cluster, layers: Sequence[Layer], experts: int, mixes: int) -> list[Layer]:
    """Scales the batches' weights so that each kind of batch counts by its relative, not its absolute, change."""
    slots = share_out(cluster, [experts] * len(layers))
    picked = range(0, len(layers), max(1, len(layers) // 8))
    usual = np.mean(
        [by_mix(layers[i].costs, layers[i].batches, begin(layers[i], slots[i]), mixes) for i in picked], axis=0
    )
    scale = 1.0 / np.maximum(usual, 1e-12)
    return [replace(layer, weight=layer.weight * scale[layer.batches.mix]) for layer in layers]


def count_experts(trace: Trace) -> int:
    """Experts of a layer, by the highest that the trace hits."""
    real = trace.experts[trace.experts != NO_EXPERT]
    return int(real.max()) + 1 if len(real) else 1


def _place_shared(cluster: Cluster, index: int, mixes: Sequence[Mix], layer: Layer, replicas: Replicas) -> int | None:
    """Where the shared expert makes the layer end first; None: at the coordinator, beside the nodes' work."""
    if cluster.shared is None:
        return None
    here = cluster.shared.nbytes / cluster.shared.bw_Bps
    best = float(layer.weight @ np.maximum(here, makespans(layer.costs, layer.batches, replicas)))
    where = None
    for place, found in enumerate(cluster.places):
        if found.mem_bytes == 0:
            continue
        costs = layer_costs(cluster, index, mixes, place)
        cost = float(layer.weight @ makespans(costs, layer.batches, replicas))
        if cost < best * (1 - 1e-9):
            best, where = cost, place
    return where


def _by_reach(cluster: Cluster) -> list[int]:
    """Places, the ones that answer first in front."""
    size = cluster.bytes_of(0)
    nodes = cluster.nodes
    return sorted(
        range(len(cluster.places)),
        key=lambda p: (
            nodes[cluster.places[p].node].rtt_s
            + nodes[cluster.places[p].node].msg_s
            + size / cluster.places[p].bw_Bps,
            p,
        ),
    )
