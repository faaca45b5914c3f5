"""One layer's batches of one kind, as far as a lower bound (bound.py) needs them, and the search for multipliers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .makespan import time_for
from .native import Floats, LayerCosts
from .traces import Batches

PAIR_BATCHES = 8192  # of one kind and layer, whose pairs are counted; the bound is one for these batches
PAIR_STATES = 100_000  # of a proof by two sets, at most
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

    @classmethod
    def of(
        cls, costs: LayerCosts, mix: int, batches: Batches, experts: int, usable: npt.NDArray[np.bool_]
    ) -> "LayerHits":
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
                for tried in center.around(spread):
                    value = self.value(sets, [*multipliers[:at], tried, *multipliers[at + 1 :]])
                    if value > best:
                        best, multipliers[at] = value, tried
                center, spread = multipliers[at], Multipliers(spread.beta / 2.5, spread.gamma / 2.5)
        return best, multipliers

    def _spread(self, one: "SetTimes", wide: bool) -> Multipliers:
        most = max(1, one.times.shape[1] - 1)
        slope = (float(one.times[np.isfinite(one.times)].max()) - float(self.floor.min())) / most or 1e-12
        return (
            Multipliers(1.5 * slope, 8.0 * slope / most) if wide else Multipliers(0.25 * slope, 0.25 * slope / most)
        )

    def curve(self, one: "SetTimes", multipliers: Multipliers) -> Floats:
        """For each number of experts [experts + 1] with a replica outside the set, a bound of the mean in seconds."""
        kept = float(self.often @ (one.times + multipliers.penalty(one.times.shape[1])).min(axis=1))
        return np.array([kept - self.most_hit(multipliers, room) for room in range(self.experts + 1)])

    def most_hit(self, multipliers: Multipliers, room: int) -> float:
        """At most this much of the penalty do `room` experts bring about."""
        if room == 0 or multipliers == (0.0, 0.0):
            return 0.0
        worth = multipliers.beta * self.alone + multipliers.gamma / 2 * self.together[:, room - 1]
        return float(np.partition(worth, self.experts - room)[self.experts - room :].sum())
