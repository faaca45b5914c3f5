"""When a new plan is worth its copies.

The search starts from the plan in force, and each replica that is not there yet costs what copying it costs over the
time that the traffic is expected to stay as it is. What it finds is adopted only if, on sequences that it was not
made from,

- the gain is above twice its standard error and above `LEAST_GAIN`, so that chance moves nothing, and
- it pays back: M copies of b bytes at a rate B, while which a share φ of the service is lost, cost φ M b / B seconds;
  a gain of Δ seconds a step makes up for them after φ M b / (B Δ) steps, twice which must be within the horizon.

Under traffic that does not change, the plan in force was found under the same traffic: what a new search finds lies
within the noise, and nothing moves.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .makespan import layer_costs
from .native import Floats, Replicas, makespans
from .plan import Placement, score, score_batches, weigh
from .search import improve, moves_for, prepare
from .traces import Batches, Mix, Trace, in_pool

LEAST_GAIN = 0.01  # of a step's time
CERTAIN = 2.0  # standard errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """What moving experts costs, and for how long it has to pay."""

    bytes_per_s: float  # at which all copies together are made
    service_lost: float = 0.2  # share of the service that is lost while copies are made; 1: it stops
    horizon_steps: float  # steps for which the traffic is expected to stay as it is


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to adopt `plan`, and why, in one sentence."""

    adopt: bool
    plan: Placement
    moved_bytes: int
    break_even_steps: float  # infinite without a gain
    sentence: str


def replan(
    current: Placement, recent: Trace, migration: Migration, seed: int = 0, threads: int = 1, effort: float = 1.0
) -> Decision:
    """Looks for a better plan for `recent` traffic, within the slots of the plan in force."""
    cluster, mixes = current.cluster, current.mixes
    experts = len(current.replicas[0])
    fit, held = recent.split()
    usual = float(current.expected.mean())  # seconds of a layer
    moves = int(effort * moves_for(recent.layers))
    with ThreadPoolExecutor(threads) as pool:
        each = in_pool(pool)
        layers = prepare(cluster, fit, experts, mixes, seed, current.replicas, each)
        layers = weigh(cluster, layers, experts, len(mixes))

        def solve(index: int) -> Replicas:
            seconds = migration.service_lost * cluster.bytes_of(index) / migration.bytes_per_s
            cost = seconds / (migration.horizon_steps * usual)
            plan = current.replicas[index]
            return improve(layers[index], current.slots[index], plan, moves, seed + 1 + index, cost)[0]

        found = each(solve, range(len(layers)))
    scored = score_batches(held, mixes, seed)
    before = [_times(current, index, part, current.replicas[index]) for index, part in enumerate(scored)]
    after = [_times(current, index, part, found[index]) for index, part in enumerate(scored)]
    gain, doubt = _gain(scored, before, after, mixes)
    copies = [int(np.bitwise_count(new & ~old).sum()) for new, old in zip(found, current.replicas, strict=True)]
    moved = sum(count * cluster.bytes_of(index) for index, count in enumerate(copies))
    step = float(sum(times.mean() for times in before))
    sure = gain - CERTAIN * doubt
    spent = migration.service_lost * moved / migration.bytes_per_s
    steps = spent / sure if sure > 0 else float("inf")
    adopt = bool(moved) and sure > LEAST_GAIN * step and 2 * steps < migration.horizon_steps
    share = gain / step if step else 0.0
    if adopt:
        sentence = (
            f"A new plan saves {share:.1%} of a step and pays back its {moved:,} bytes after {steps:,.0f} steps."
        )
    elif sure <= LEAST_GAIN * step:
        sentence = f"The plan in force stays: what another would save ({share:.1%}) may be chance."
    else:
        sentence = f"The plan in force stays: another would save {share:.1%}, but its copies would not pay back."
    plan = score(cluster, mixes, found, current.slots, held, current.shared_at, seed, threads) if adopt else current
    return Decision(adopt, plan, moved, steps, sentence)


def _times(plan: Placement, index: int, batches: Batches, replicas: Replicas) -> Floats:
    return makespans(layer_costs(plan.cluster, index, plan.mixes, plan.shared_at[index]), batches, replicas)


def _gain(
    batches: Sequence[Batches], before: Sequence[Floats], after: Sequence[Floats], mixes: Sequence[Mix]
) -> tuple[float, float]:
    """Mean seconds saved a step, and its standard error: batches are the same tokens in all layers."""
    saved = np.sum([old - new for old, new in zip(before, after, strict=True)], axis=0)
    means, variances = [], []
    for mix in range(len(mixes)):
        part = saved[batches[0].mix == mix]
        means.append(float(part.mean()))
        variances.append(float(part.var()) / len(part))
    return float(np.mean(means)), float(np.sqrt(np.sum(variances))) / len(mixes)
