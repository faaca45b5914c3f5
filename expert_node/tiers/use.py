"""How much an expert is used: a count in which old uses fade, what follows it, and how often a guess comes true.

A use counts 1 and fades by half every HALF_LIFE tokens (LRFU: Lee et al., 2001, of which LRU and LFU are the ends).
Instead of letting all counts fade, a new use weighs more than the last: counts are kept as logarithms and compare
across time as they are.
"""

from collections import deque
from collections.abc import Collection, Sequence
from math import log2
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

HALF_LIFE = 16.0  # tokens, or steps of a batch
LAGS = 2  # layers between which transitions are counted
LIKELY_SHARE = 0.35  # an expert that followed in so many cases is fetched ahead
PLACES = 8
_BELIEF = 16.0  # guesses
_REMEMBERED = 4000.0  # guesses of a place; older ones count less
_FULL = 60_000  # requests after which a table's counters, of 16 bits, are halved


Numbers: TypeAlias = npt.NDArray[np.intp]


def used(count: float, time: float) -> float:
    """The logarithm of an expert's count after a use at `time` (in half-lives), `count` before (-inf: none)."""
    if count <= time:
        return time + log2(1 + 2.0 ** (count - time))
    return count + log2(1 + 2.0 ** (time - count))


class Transitions:
    """Which experts followed which, one and two layers later: what a node foresees without the coordinator's help.

    Counts are of requests whose experts on this node were both seen; a table is [experts, experts] uint16.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        """`experts` in each MoE layer. The last layer is followed by the first, of the next token."""
        self._experts = experts
        self._together: dict[tuple[int, int], npt.NDArray[np.uint16]] = {}  # by layer, and how many layers later
        self._alone: dict[tuple[int, int], npt.NDArray[np.uint16]] = {}
        self._counted: dict[tuple[int, int], int] = {}  # requests
        self._last: deque[tuple[int, Numbers]] = deque(maxlen=LAGS)  # layers and experts, the newest first

    def note(self, layer: int, experts: Collection[int]) -> None:
        """A request of one step hit these experts."""
        here = np.array(sorted(experts), dtype=np.intp)
        for lag, (before, rows) in enumerate(self._last, 1):
            if (before + lag) % len(self._experts) == layer and len(rows):
                self._count(before, lag, rows, here)
        self._last.appendleft((layer, here))

    def likely(self, layer: int, distance: int, at_least: float = LIKELY_SHARE) -> list[int]:
        """Experts of the layer that comes `distance` after `layer`, likeliest first; see LIKELY_SHARE.

        Judged by the last request's experts, of `layer`, and by those of the request before it, where enough layers
        lie between: the mean of how often each of them was followed by an expert.
        """
        shares = [
            self._share(before, distance + age, rows)
            for age, (before, rows) in enumerate(self._last)
            if (before + age) % len(self._experts) == layer
            and (before, distance + age) in self._together
            and len(rows)
        ]
        if not shares:
            return []
        share = np.mean(shares, axis=0)
        order = np.argsort(-share, kind="stable")
        return [int(number) for number in order[: np.count_nonzero(share >= at_least)]]

    def _share(self, before: int, lag: int, rows: Numbers) -> npt.NDArray[np.float64]:
        seen = np.maximum(self._alone[before, lag][rows], 4)  # a row seen once knows nothing
        share: npt.NDArray[np.float64] = (self._together[before, lag][rows] / seen[:, None]).mean(axis=0)
        return share

    def _count(self, before: int, lag: int, rows: Numbers, here: Numbers) -> None:
        key = before, lag
        together = self._together.get(key)
        if together is None:
            shape = self._experts[before], self._experts[(before + lag) % len(self._experts)]
            together = self._together[key] = np.zeros(shape, dtype=np.uint16)
            self._alone[key] = np.zeros(shape[0], dtype=np.uint16)
            self._counted[key] = 0
        together[rows[:, None], here] += 1
        self._alone[key][rows] += 1
        self._counted[key] += 1
        if self._counted[key] == _FULL:
            together //= 2
            self._alone[key] //= 2
            self._counted[key] //= 2


Source = tuple[bool, int]  # of a guess: whether it is the coordinator's, and how many layers ahead it was made
Guesses = dict[Source, list[tuple[int, int]]]  # for one layer: experts, each with its place


class Chances:
    """How often what was guessed was asked for, by the guess's source and the expert's place in it.

    Places are PLACES for as many experts as a router would choose, and as many beyond. It starts with a belief that
    weighs as much as _BELIEF guesses.
    """

    def __init__(self) -> None:
        self._seen: dict[Source, list[float]] = {}
        self._came: dict[Source, list[float]] = {}

    def of(self, source: Source) -> list[float]:
        """For each place the share of guesses that came true, between 0 and 1."""
        if source not in self._seen:
            self._seen[source] = [_BELIEF] * 2 * PLACES
            self._came[source] = [0.8 * _BELIEF] * PLACES + [0.4 * _BELIEF] * PLACES
        return [came / seen for came, seen in zip(self._came[source], self._seen[source], strict=True)]

    def note(self, guesses: Guesses, asked: Collection[int]) -> None:
        """A layer asked for these."""
        for source, guess in guesses.items():
            seen, came = self._seen[source], self._came[source]
            for number, place in guess:
                seen[place] += 1
                came[place] += number in asked
            if max(seen) > _REMEMBERED:
                self._seen[source] = [count / 2 for count in seen]
                self._came[source] = [count / 2 for count in came]


def place_of(rank: int, chosen: int) -> int:
    """The place of the `rank`-th expert (from 0) of a guess for a layer that chooses `chosen`."""
    return min(rank * PLACES // chosen, 2 * PLACES - 1)
