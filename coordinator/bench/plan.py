"""The planner beside other ways to place experts, on made-up clusters and traces (placement/synthetic.py).

Every way gets the same memory and is scored with the same exact dispatch on the same held-back batches, so what
differs is where the experts lie. The planner may share memory out unevenly over the layers; the others and the
reference get the same slots in each. `reference` is the capacity reference of earlier work: what each set of nodes
needs for the mean of what must be left to it; it is no proof. `bound` is one, for plans with the planner's slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from time import perf_counter
from typing import Any

import numpy as np

from ..placement import baselines, synthetic
from ..placement.makespan import layer_costs, popularity, time_for
from ..placement.native import Floats, LayerCosts, Replicas
from ..placement.plan import make_plan, score_batches
from ..placement.search import by_mix
from ..placement.slots import share_out
from ..placement.traces import DEFAULT_MIXES, Batches, Trace, sample

LAYERS = 60
SPARE = 0.25
SEQUENCES = 640  # of 96 tokens in the mean; plans are made from three quarters of them
GEOMETRIES = ((256, 8, 1_800_000), (512, 10, 7_000_000))  # experts, top-k, bytes of an expert

# What held-back makespans should reach: (cluster, experts) → for batches of 1, 4 and 16, as a multiple of the proven
# bound of free placement on A, of the reference on B and C.
GOALS = {
    ("A", 256): (1.04, 1.02, 1.01),
    ("A", 512): (1.05, 1.02, 1.01),
    ("B", 256): (1.06, 1.05, 1.03),
    ("B", 512): (1.16, 1.08, 1.03),
    ("C", 256): (1.05, 1.06, 1.05),
    ("C", 512): (1.20, 1.17, 1.09),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One cluster with one geometry."""

    cluster: str
    experts: int
    planned_s: float  # wall time of planning
    times: dict[str, Floats]  # way → mean seconds of a layer [mixes]
    bound: Floats  # [mixes] seconds of a layer, for the same slots
    bound_any: Floats  # [mixes], for any sharing out of the memory
    reference: Floats  # [mixes]


def measure_plans(clusters: str, sizes: Sequence[int], threads: int, seed: int) -> list[Case]:
    """Plans for each of `clusters` (letters) and `sizes` (experts a layer)."""
    cases = []
    for experts, top_k, nbytes in GEOMETRIES:
        if experts not in sizes:
            continue
        trace = synthetic.trace(LAYERS, experts, top_k, SEQUENCES, seed + 1)
        for name in clusters:
            cases.append(_measure(name, experts, nbytes, trace, threads, seed))
    return cases


def _measure(name: str, experts: int, nbytes: int, trace: Trace, threads: int, seed: int) -> Case:
    cluster = synthetic.cluster(name, experts, LAYERS, nbytes, SPARE)
    start = perf_counter()
    plan = make_plan(cluster, trace, DEFAULT_MIXES, seed, threads, experts)
    seconds = perf_counter() - start
    fit, held = trace.split()
    fitted = sample(fit, DEFAULT_MIXES, (2000, 1000, 400), seed)
    scored = score_batches(held, DEFAULT_MIXES, seed)
    mixes = len(DEFAULT_MIXES)
    times = {"planner": plan.expected.mean(axis=0)}
    even = share_out(cluster, [experts] * LAYERS)
    ways = ("random", "round robin", "equal share", "EPLB")
    sums = {way: np.zeros(mixes) for way in ways}
    reference = np.zeros(mixes)
    for index in range(LAYERS):
        costs = layer_costs(cluster, index, DEFAULT_MIXES)
        load = popularity(fitted[index].hits, np.ones(len(fitted[index].mix)), fitted[index].offsets, experts)
        slots = even[index]
        made: dict[str, Replicas] = {
            "random": baselines.random_plan(load, slots, seed),
            "round robin": baselines.round_robin(load, slots),
            "equal share": baselines.equal_share(load, slots),
            "EPLB": baselines.eplb(load, slots),
        }
        for way, replicas in made.items():
            sums[way] += by_mix(costs, scored[index], replicas, mixes)
        reference += [capacity_reference(costs, scored[index], mix, experts, slots) for mix in range(mixes)]
    times |= {way: total / LAYERS for way, total in sums.items()}
    return Case(
        name, experts, seconds, times, plan.bound_same_slots / LAYERS, plan.bound / LAYERS, reference / LAYERS
    )


def capacity_reference(costs: LayerCosts, batches: Batches, mix: int, experts: int, slots: Any) -> float:
    """Seconds: the most that a set of places needs for the mean hits less those of the hottest that fit elsewhere.

    Fractional experts, and not less than the bound of free placement. With means instead of batches it is no bound.
    """
    chosen = batches.mix == mix
    counts = np.diff(batches.offsets)
    hits = batches.hits[np.repeat(chosen, counts)]
    hottest = np.sort(np.bincount(hits, minlength=experts) / chosen.sum())[::-1]
    covered = np.concatenate([[0.0], np.cumsum(hottest)])
    fixed, step = costs.fixed[mix], costs.step
    best = float(time_for(fixed, step, counts[chosen]).mean())
    for size in range(1, len(slots) + 1):
        for inside in combinations(range(len(slots)), size):
            members = list(inside)
            left = counts[chosen].mean() - covered[min(experts, int(slots.sum() - slots[members].sum()))]
            if left > 1e-6:
                best = max(best, _fractional(fixed[members], step[members], float(left)))
    return best


def _fractional(fixed: Floats, step: Floats, wanted: float) -> float:
    """Seconds in which places compute `wanted` experts that may be cut."""
    order = np.argsort(fixed)
    rate = spent = 0.0
    for position, place in enumerate(order):
        rate += 1 / step[place]
        spent += fixed[place] / step[place]
        ends = (wanted + spent) / rate
        if position + 1 == len(order) or ends <= fixed[order[position + 1]]:
            return float(ends)
    raise AssertionError("there is a place")


def rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """One row for each cluster, geometry and batch; times are milliseconds a layer."""
    found = []
    for case in cases:
        for number, mix in enumerate(DEFAULT_MIXES):
            planner = float(case.times["planner"][number])
            reference = float((case.bound if case.cluster == "A" else case.reference)[number])
            goal = GOALS[case.cluster, case.experts][number]
            row: dict[str, Any] = {"cluster": case.cluster, "experts": case.experts, "batch": str(mix)}
            row |= {f"{way.replace(' ', '_')}_ms": 1e3 * float(times[number]) for way, times in case.times.items()}
            row |= {
                "bound_ms": 1e3 * float(case.bound[number]),
                "bound_any_ms": 1e3 * float(case.bound_any[number]),
                "reference_ms": 1e3 * float(case.reference[number]),
                "above_bound": planner / float(case.bound[number]),
                "above_reference": planner / reference,
                "goal": goal,
                "met": planner / reference <= goal,
                "less_than_eplb": 1 - planner / float(case.times["EPLB"][number]),
                "planned_s": case.planned_s,
            }
            found.append(row)
    return found
