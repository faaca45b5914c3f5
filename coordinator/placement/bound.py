"""A lower bound: seconds that no plan for this cluster can go below on these batches, however clever.

Two proofs, the better of which counts for each kind of batch:

*Free placement.* Were every expert on every place, a batch of d distinct experts would still take `time_for(d)`.

*Memory.* Take a set S of places, say the slow ones. At most M experts of a layer have a replica outside S, as many as
fit there; call them X. A batch whose hits D are not all in X leaves |D \\ X| experts that only S can compute, so it
takes at least ψ = time of S for |D \\ X|. The mean of ψ over the batches has to be bounded over *every* X of M
experts. With h = |D ∩ X| and any numbers β and γ,

    mean ψ(d, h) >= mean min_h [ψ(d, h) + β h + γ h(h-1)/2] - max over X of [β Σ w_e + γ Σ w_ef]

where w_e is how often e is hit and w_ef how often e and f are hit together. The last maximum is at most the sum of
the M largest of β w_e + γ/2 × (sum of the M-1 largest w_ef of that e). β and γ are searched for; each gives a valid
bound. The pair term is what says that no X can hold all experts of many batches at once, which decides small batches.

Memory may be shared out unevenly over the layers: with a price for a byte outside S, each layer takes what is
cheapest for it, and the sum less the price of all bytes is a bound for any sharing out (Lagrange).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .cluster import Cluster
from .makespan import layer_costs, time_for
from .native import Floats, LayerCosts
from .traces import Batches, Mix

SETS = 3  # sets S that are looked into, of those that mean loads make look best
PAIR_BATCHES = 2048  # of one kind and layer, whose pairs are counted; the bound is one for these batches


class Bounds(NamedTuple):
    """Seconds [mixes] of all layers together."""

    any_plan: Floats  # however memory is shared out over the layers
    same_slots: Floats  # for plans that give each layer as many slots on each place as this one does


def lower_bounds(
    cluster: Cluster,
    mixes: Sequence[Mix],
    batches: Sequence[Batches],
    experts: int,
    slots: npt.NDArray[np.int32],
    threads: int = 1,
) -> Bounds:
    """Both bounds for `batches` [layers], those that a plan with `slots` [layers, places] is scored on."""
    usable = np.array([place.mem_bytes for place in cluster.places]) >= min(cluster.expert_bytes)
    costs = [layer_costs(cluster, layer, mixes) for layer in range(len(batches))]
    any_plan, same_slots = np.zeros(len(mixes)), np.zeros(len(mixes))
    with ThreadPoolExecutor(threads) as pool:
        for mix in range(len(mixes)):

            def count(layer: int, mix: int = mix) -> _Layer:
                return _Layer.of(costs[layer], mix, batches[layer], experts, usable)

            layers = list(pool.map(count, range(len(batches))))
            any_plan[mix] = same_slots[mix] = sum(float(layer.free.mean()) for layer in layers)
            best: tuple[float, npt.NDArray[np.bool_], Multipliers] | None = None
            even = slots.mean(axis=0).astype(np.int32)
            for inside in _sets(layers[0], usable, even):
                value, multipliers = layers[0].search(layers[0].times(inside & usable), _room(even, inside, experts))
                if best is None or value > best[0]:
                    best = value, inside, multipliers
            if best is not None:
                either, same = _memory_bounds(cluster, best[1], best[2], usable, layers, slots, pool)
                any_plan[mix], same_slots[mix] = max(any_plan[mix], either), max(same_slots[mix], same)
    return Bounds(any_plan, np.maximum(any_plan, same_slots))


def _bytes_outside(cluster: Cluster, outside: npt.NDArray[np.bool_]) -> int:
    """Bytes that experts can take there: whole experts, where all have one size."""
    sizes = set(cluster.expert_bytes)
    unit = sizes.pop() if len(sizes) == 1 else 1
    return sum(p.mem_bytes // unit * unit for p, out in zip(cluster.places, outside, strict=True) if out)


def _room(slots: npt.NDArray[np.int32], inside: npt.NDArray[np.bool_], experts: int) -> int:
    """Experts of a layer that may have a replica outside S."""
    return min(experts, int(slots[~inside].sum()))


def _sets(
    layer: "_Layer", usable: npt.NDArray[np.bool_], slots: npt.NDArray[np.int32]
) -> list[npt.NDArray[np.bool_]]:
    """The sets S worth a proof, by the time that they would need for the mean of what must be left to them."""
    places = np.flatnonzero(usable)
    fixed, step = layer.fixed, layer.step
    found: set[tuple[int, ...]] = set()
    if len(places) <= 10:
        for size in range(1, len(places)):
            found.update(combinations(places.tolist(), size))
    else:
        for order in (np.argsort(step[places]), np.argsort(fixed[places]), np.argsort((fixed + 4 * step)[places])):
            found.update(tuple(sorted(places[order][skip:].tolist())) for skip in range(1, len(places)))
    hottest = np.concatenate([[0.0], np.cumsum(-np.sort(-layer.alone))])
    mean = float(layer.distinct.mean())
    scored = []
    for members in sorted(found):
        inside = np.zeros(len(usable), dtype=np.bool_)
        inside[list(members)] = True
        left = mean - hottest[_room(slots, inside, layer.experts)]
        if left > 1e-6:
            whole = int(left)
            low, high = time_for(fixed, step, np.array([max(1, whole), whole + 1]), inside)
            ends = (low + (left - whole) * (high - low)) * min(1.0, left)  # less than one: seldom touched at all
            scored.append((float(ends), members, inside))
    scored.sort(key=lambda entry: (-entry[0], entry[1]))
    return [inside for _, _, inside in scored[:SETS]]


def _memory_bounds(
    cluster: Cluster,
    inside: npt.NDArray[np.bool_],
    start: "Multipliers",
    usable: npt.NDArray[np.bool_],
    layers: Sequence["_Layer"],
    slots: npt.NDArray[np.int32],
    pool: ThreadPoolExecutor,
) -> tuple[float, float]:
    """By one set S: for any sharing out of the memory, and for `slots`."""
    experts = layers[0].experts
    at = _room(slots.mean(axis=0).astype(np.int32), inside, experts)

    def curve(index: int) -> tuple[Floats, float]:
        layer, here = layers[index], _room(slots[index], inside, experts)
        times = layer.times(inside & usable)
        _, multipliers = layer.search(times, at, start)
        # Other numbers of slots ask for other multipliers; where these are loose, those are not.
        _, fuller = layer.search(times, (at + experts) // 2, multipliers)
        bound = np.maximum(layer.curve(times, multipliers), layer.curve(times, fuller))
        bound = np.maximum(bound, float(layer.free.mean()))
        return bound, max(float(bound[here]), layer.search(times, here, multipliers)[0])

    found = list(pool.map(curve, range(len(layers))))
    curves = np.stack([bound for bound, _ in found])
    sizes = np.array([cluster.bytes_of(layer) for layer in range(len(layers))])
    budget = _bytes_outside(cluster, ~inside)
    room = np.arange(experts + 1)
    either = 0.0
    scale = float(curves.max()) / (experts * int(sizes.max()))
    for price in scale * np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 120)]):
        least = (curves + price * sizes[:, None] * room).min(axis=1).sum() - price * budget
        either = max(either, float(least))
    return either, sum(value for _, value in found)


class Multipliers(NamedTuple):
    """β and γ, in seconds."""

    beta: float
    gamma: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's batches of one kind, as far as the proof needs them."""

    fixed: Floats  # [places]
    step: Floats  # [places]
    experts: int
    distinct: npt.NDArray[np.int64]  # [batches]
    free: Floats  # [batches]: the bound of free placement
    alone: Floats  # [experts]: w_e
    together: Floats  # [experts, experts]: of each e, the sum of its m largest w_ef, m from 0
    kinds: npt.NDArray[np.int64]  # the numbers of distinct experts that there are
    floor: Floats  # [kinds]: the bound of free placement
    often: Floats  # [kinds]: their share of the batches

    @classmethod
    def of(
        cls, costs: LayerCosts, mix: int, batches: Batches, experts: int, usable: npt.NDArray[np.bool_]
    ) -> "_Layer":
        chosen = np.flatnonzero(batches.mix == mix)[:PAIR_BATCHES]
        counts = np.diff(batches.offsets)
        mine = np.zeros(len(counts), dtype=np.bool_)
        mine[chosen] = True
        hit = np.zeros((len(chosen), experts), dtype=np.float32)
        hit[np.repeat(np.arange(len(chosen)), counts[chosen]), batches.hits[np.repeat(mine, counts)]] = 1.0
        distinct = counts[chosen]
        pairs = hit.T @ hit / len(chosen)
        np.fill_diagonal(pairs, 0.0)
        pairs = -np.sort(-pairs, axis=1)[:, : experts - 1].astype(np.float64)
        together = np.concatenate([np.zeros((experts, 1)), np.cumsum(pairs, axis=1)], axis=1)
        fixed, step = costs.fixed[mix], costs.step
        kinds, inverse = np.unique(distinct, return_inverse=True)
        floor = time_for(fixed, step, kinds, usable)
        often = np.bincount(inverse) / len(chosen)
        alone = hit.mean(axis=0, dtype=np.float64)
        return cls(fixed, step, experts, distinct, floor[inverse], alone, together, kinds, floor, often)

    def times(self, inside: npt.NDArray[np.bool_]) -> Floats:
        """ψ [kinds, h], infinite where h is more than there are."""
        hits = np.arange(int(self.kinds.max()) + 1)
        left = self.kinds[:, None] - hits
        alone = time_for(self.fixed, self.step, hits, inside)
        return np.where(left >= 0, np.maximum(alone[np.maximum(left, 0)], self.floor[:, None]), np.inf)

    def search(self, times: Floats, room: int, start: Multipliers | None = None) -> tuple[float, Multipliers]:
        """The best bound found for `room` experts outside S: a grid, then finer ones around its best point.

        With a `start`, the multipliers of a layer like this one, only the finer ones.
        """
        most = max(1, times.shape[1] - 1)
        finite = np.where(np.isfinite(times), times, 0.0)
        slope = float(finite.max() - self.floor.min()) / most or 1e-12
        beta, gamma = start or Multipliers(slope, 0.0)
        wide, tall = (0.25 * slope, 0.25 * slope / most) if start else (1.5 * slope, 8.0 * slope / most)
        best = -np.inf
        for _ in range(5 if start is None else 4):
            betas = beta + wide * np.linspace(-1, 1, 9 if start is None else 5)
            gammas = np.maximum(0.0, gamma + tall * np.linspace(-1, 1, 9 if start is None else 5))
            for b in betas:
                for g in np.unique(gammas):
                    value = self._kept(times, b, g) - self._most_hit(b, g, room)
                    if value > best:
                        best, beta, gamma = value, float(b), float(g)
            wide, tall = wide / 3, tall / 3
        return best, Multipliers(beta, gamma)

    def curve(self, times: Floats, multipliers: Multipliers) -> Floats:
        """For each number of experts [experts + 1] with a replica outside S, a bound of the mean in seconds."""
        constant = self._kept(times, *multipliers)
        return np.array([constant - self._most_hit(*multipliers, room) for room in range(self.experts + 1)])

    def _kept(self, times: Floats, beta: float, gamma: float) -> float:
        hits = np.arange(times.shape[1])
        return float(self.often @ (times + (beta * hits + gamma / 2 * hits * (hits - 1))).min(axis=1))

    def _most_hit(self, beta: float, gamma: float, room: int) -> float:
        if room == 0:
            return 0.0
        worth = beta * self.alone + gamma / 2 * self.together[:, room - 1]
        return float(np.partition(worth, self.experts - room)[self.experts - room :].sum())
