"""One layer's batches of one kind, as far as a lower bound (bound.py) needs them, and the search for multipliers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .makespan import time_for
from .native import Floats, LayerCosts, LeastSum, count_pairs, least_sum
from .traces import Batches

PAIR_BATCHES = 16_384  # of one kind and layer, whose pairs are counted; the bound is one for these batches
PAIR_STATES = 100_000  # of a proof by two sets, at most
PATIENCE = 4  # steps without a better bound, after which they become half as long
ENOUGH = 1e-4  # of the bound: less is no better bound
NEVER = 1e-12  # hits a batch, instead of none
AHEAD = 0.03  # of the bound: how far above it the steps aim
COARSE = 5  # points of a grid, each way
FINE_ROUNDS = 4


class Multipliers(NamedTuple):
    """β and γ, in seconds."""

    beta: float
    gamma: float

    def penalty(self, hits: int) -> Floats:
        """β h + γ h(h-1)/2 for all h below `hits`."""
        h = np.arange(hits)
        return self.beta * h + self.gamma / 2 * h * (h - 1)

    def around(self, spread: "Multipliers") -> Iterator["Multipliers"]:
        """A grid around these; γ is never negative."""
        offsets = np.linspace(-1, 1, COARSE)
        for beta in self.beta + spread.beta * offsets:
            for gamma in np.unique(np.maximum(0.0, self.gamma + spread.gamma * offsets)):
                yield Multipliers(float(beta), float(gamma))


class Prices(NamedTuple):
    """Multipliers of each expert's own, in seconds a batch."""

    experts: Floats  # [sets, experts]: what holding an expert outside the set costs, β_e w_e
    pair: Floats  # [sets]: γ


class SetTimes(NamedTuple):
    """A set S of places in a proof."""

    inside: npt.NDArray[np.bool_]  # [places]
    times: Floats  # ψ [kinds, h]; infinite where h is more than there are
    room: int  # experts that may have a replica outside S


@dataclass(frozen=True, slots=True)
class LayerHits:
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
    offsets: npt.NDArray[np.int64]  # [batches + 1] into hits
    hits: npt.NDArray[np.uint16]
    kind: npt.NDArray[np.int32]  # [batches]: which of `kinds`

    @classmethod
    def of(
        cls, costs: LayerCosts, mix: int, batches: Batches, experts: int, usable: npt.NDArray[np.bool_]
    ) -> "LayerHits":
        chosen = np.flatnonzero(batches.mix == mix)[:PAIR_BATCHES]
        counts = np.diff(batches.offsets)
        mine = np.zeros(len(counts), dtype=np.bool_)
        mine[chosen] = True
        hits = np.ascontiguousarray(batches.hits[np.repeat(mine, counts)])
        distinct = counts[chosen]
        offsets = np.concatenate([[0], np.cumsum(distinct)])
        pairs = -np.sort(-count_pairs(offsets, hits, experts), axis=1)[:, : experts - 1] / len(chosen)
        together = np.concatenate([np.zeros((experts, 1)), np.cumsum(pairs, axis=1)], axis=1)
        fixed, step = costs.fixed[mix], costs.step
        kinds, inverse = np.unique(distinct, return_inverse=True)
        floor = time_for(fixed, step, kinds, usable)
        often = np.bincount(inverse) / len(chosen)
        alone = np.bincount(hits, minlength=experts) / len(chosen)
        return cls(
            fixed, step, experts, distinct, floor[inverse], alone, together, kinds, floor, often, offsets, hits,
            inverse.astype(np.int32),
        )  # fmt: skip

    def at(self, inside: npt.NDArray[np.bool_], usable: npt.NDArray[np.bool_], room: int) -> "SetTimes":
        """A set of places, with room for so many experts outside it."""
        hits = np.arange(int(self.kinds.max()) + 1)
        left = self.kinds[:, None] - hits
        alone = time_for(self.fixed, self.step, hits, inside & usable)
        times = np.where(left >= 0, np.maximum(alone[np.maximum(left, 0)], self.floor[:, None]), np.inf)
        return SetTimes(inside, times, room)

    def value(self, sets: Sequence["SetTimes"], multipliers: Sequence[Multipliers]) -> float:
        """The bound that these multipliers give, with one set or two."""
        first, one = sets[0], multipliers[0]
        times = first.times + one.penalty(first.times.shape[1])
        if len(sets) == 1:
            return float(self.often @ times.min(axis=1)) - self.most_hit(one, first.room)
        other, two = sets[1], multipliers[1]
        both = np.maximum(first.times[:, :, None], other.times[:, None, :])
        both += one.penalty(both.shape[1])[:, None] + two.penalty(both.shape[2])
        # Whoever has a replica outside the larger set has one outside the smaller.
        if not (first.inside & ~other.inside).any():
            both[:, *np.triu_indices(both.shape[1], 1)] = np.inf
        elif not (other.inside & ~first.inside).any():
            both[:, *np.tril_indices(both.shape[1], -1)] = np.inf
        kept = float(self.often @ both.min(axis=(1, 2)))
        return kept - self.most_hit(one, first.room) - self.most_hit(two, other.room)

    def values(self, one: "SetTimes", grid: Sequence[Multipliers]) -> Floats:
        """As `value`, with one set, of many multipliers at once."""
        beta, gamma = np.array(grid).T[:, :, None]
        h = np.arange(one.times.shape[1])
        penalty = beta * h + gamma / 2 * (h * (h - 1))
        kept: Floats = (one.times + penalty[:, None]).min(axis=2) @ self.often
        if one.room == 0:
            return kept
        worth = beta * self.alone + gamma / 2 * self.together[:, one.room - 1]
        split = self.experts - one.room
        kept -= np.partition(worth, split, axis=1)[:, split:].sum(axis=1)
        return kept

    def can_pair(self) -> bool:
        """Whether batches are so small that a proof by two sets takes little time."""
        return len(self.kinds) * (int(self.kinds.max()) + 1) ** 2 <= PAIR_STATES

    def search(
        self, sets: Sequence["SetTimes"], start: Sequence[Multipliers] = (), rounds: int = FINE_ROUNDS
    ) -> tuple[float, list[Multipliers]]:
        """The best bound found with one set or two: grids around the best point so far, ever finer.

        Without a `start` for the last of the sets, wide ones at first.
        """
        multipliers = [*start, *[Multipliers(0.0, 0.0)] * (len(sets) - len(start))]
        best = self.value(sets, multipliers)
        for turn in range(len(sets)):
            at = len(sets) - 1 - turn
            wide = at >= len(start)
            spread = self._spread(sets[at], wide)
            center = Multipliers(spread.beta / 1.5, 0.0) if wide else multipliers[at]
            for _ in range(rounds):
                grid = list(center.around(spread))
                values = (
                    self.values(sets[0], grid)
                    if len(sets) == 1
                    else [self.value(sets, [*multipliers[:at], tried, *multipliers[at + 1 :]]) for tried in grid]
                )
                if (value := float(max(values))) > best:
                    best, multipliers[at] = value, grid[int(np.argmax(values))]
                center, spread = multipliers[at], Multipliers(spread.beta / 2.5, spread.gamma / 2.5)
        return best, multipliers

    def prices(self, multipliers: Sequence[Multipliers]) -> Prices:
        """The same for all experts."""
        beta, gamma = np.array(multipliers).T
        return Prices(beta[:, None] * self.alone, np.ascontiguousarray(gamma))

    def raise_bound(self, sets: Sequence["SetTimes"], start: Prices, steps: int) -> tuple[float, Prices]:
        """The best bound found with prices of each expert's own, by steps along the supergradient.

        An expert that batches take more often than it can be held becomes dearer, and the other way round; the
        lengths of steps are those of Held and Karp (1971).
        """
        count = len(self.distinct)
        usual = np.maximum(self.alone, NEVER)
        best, best_prices, prices = -np.inf, start, start
        length, since = 1.0, 0
        for _ in range(steps):
            found = self._least(sets, prices)
            value = found.sum / count
            slope, pair_slope = found.used / (count * usual), found.pairs / count
            scale = np.ones(len(sets))
            for number, one in enumerate(sets):
                held, worth = self._most_held(prices, number, one.room)
                value -= worth
                slope[number, held] -= 1.0
                if one.room:
                    most = max(float(self.together[held, one.room - 1].sum()) / 2, NEVER)
                    pair_slope[number] -= most
                    scale[number] = np.sqrt(one.room) / most  # a pair's price moves what an expert's would
            since += 1
            if value > best:
                since = 0 if value > best * (1 + ENOUGH) else since
                best, best_prices = value, prices
            if since >= PATIENCE:
                length, since = length / 2, 0
            norm = float((slope**2).sum() + ((pair_slope * scale) ** 2).sum())
            if norm == 0.0:
                break
            step = length * AHEAD * best / norm
            pair = np.maximum(0.0, prices.pair + step * pair_slope * scale**2)
            prices = Prices(prices.experts + step * slope, pair)
        return best, best_prices

    @staticmethod
    def _nested(sets: Sequence["SetTimes"]) -> int:
        """1 if the first of two sets lies within the second, -1 if the second does, else 0."""
        if len(sets) == 1:
            return 0
        first, other = sets[0].inside, sets[1].inside
        return 1 if not (first & ~other).any() else -1 if not (other & ~first).any() else 0

    def _spread(self, one: "SetTimes", wide: bool) -> Multipliers:
        most = max(1, one.times.shape[1] - 1)
        slope = (float(one.times[np.isfinite(one.times)].max()) - float(self.floor.min())) / most or 1e-12
        return (
            Multipliers(1.5 * slope, 8.0 * slope / most) if wide else Multipliers(0.25 * slope, 0.25 * slope / most)
        )

    def carried(self, prices: Prices, other: "LayerHits") -> Prices:
        """Prices of another layer's experts for those that are hit as often as they are, in order."""
        mine, theirs = (np.argsort(-layer.alone, kind="stable") for layer in (self, other))
        experts = np.empty_like(prices.experts)
        experts[:, mine] = prices.experts[:, theirs]
        return Prices(experts, prices.pair)

    def curve(self, one: "SetTimes", prices: Prices) -> Floats:
        """For each number of experts [experts + 1] with a replica outside the set, a bound of the mean in seconds."""
        found = self._least([one], prices)
        worth = prices.experts[0] + prices.pair[0] / 2 * self.together.T  # [room - 1, experts]
        held = np.cumsum(-np.sort(-worth, axis=1), axis=1).diagonal()  # of the `room` dearest
        return found.sum / len(self.distinct) - np.concatenate([[0.0], held])

    def most_hit(self, multipliers: Multipliers, room: int) -> float:
        """At most this much of the penalty do `room` experts bring about."""
        return self._most_held(self.prices([multipliers]), 0, room)[1]

    def _most_held(self, prices: Prices, number: int, room: int) -> tuple[npt.NDArray[np.int64], float]:
        """The `room` experts that cost most to hold outside a set, and what they cost."""
        if room == 0:
            return np.zeros(0, dtype=np.int64), 0.0
        worth = prices.experts[number] + prices.pair[number] / 2 * self.together[:, room - 1]
        held = np.argpartition(worth, self.experts - room)[self.experts - room :]
        return held, float(worth[held].sum())

    def _least(self, sets: Sequence["SetTimes"], prices: Prices) -> LeastSum:
        times = np.stack([one.times for one in sets])
        each = prices.experts / np.maximum(self.alone, NEVER)
        return least_sum(self.offsets, self.hits, self.kind, times, self._nested(sets), each, prices.pair)
