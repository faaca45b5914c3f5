"""How much an expert is used: a count in which old uses fade, and what follows it in the next layer.

A use counts 1 and fades by half every HALF_LIFE tokens (LRFU: Lee et al., 2001, of which LRU and LFU are the ends).
Instead of letting all counts fade, a new use weighs more than the last: counts are kept as logarithms and compare
across time as they are.
"""

from collections.abc import Collection, Sequence
from math import log2

import numpy as np
import numpy.typing as npt

HALF_LIFE = 16.0  # tokens, or steps of a batch
_FULL = 60_000  # of a transition's counter of 16 bits: all of a row are then halved


def used(count: float, time: float) -> float:
    """The logarithm of an expert's count after a use at `time` (in half-lives), `count` before (-inf: none)."""
    if count <= time:
        return time + log2(1 + 2.0 ** (count - time))
    return count + log2(1 + 2.0 ** (time - count))


class Transitions:
    """For each layer which experts of the next one followed: what a node foresees without the coordinator's help.

    Counts are of tokens whose experts on this node were both seen; a layer's table is [experts, experts] uint16.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        """`experts` in each MoE layer. The last layer is followed by the first, of the next token."""
        self._experts = experts
        self._together: list[npt.NDArray[np.uint16] | None] = [None] * len(experts)
        self._alone = [np.zeros(count, dtype=np.uint16) for count in experts]
        self._last: tuple[int, list[int]] | None = None

    def next_layer(self, layer: int) -> int:
        """The layer that comes after `layer`."""
        return (layer + 1) % len(self._experts)

    def note(self, layer: int, experts: Collection[int]) -> None:
        """A request of one step hit these experts."""
        here = sorted(experts)
        last, self._last = self._last, (layer, here)
        if last is None or self.next_layer(last[0]) != layer:
            return
        before, rows = last
        together = self._together[before]
        if together is None:
            together = np.zeros((self._experts[before], self._experts[layer]), dtype=np.uint16)
            self._together[before] = together
        alone = self._alone[before]
        together[np.ix_(rows, here)] += 1
        alone[rows] += 1
        for row in rows:
            if alone[row] >= _FULL:
                alone[row] //= 2
                together[row] //= 2

    def likely(self, layer: int, experts: Collection[int], at_least: float) -> list[int]:
        """Experts of the layer after `layer`, likeliest first, that followed `experts` in that share of cases."""
        together = self._together[layer]
        if together is None or not experts:
            return []
        rows = sorted(experts)
        seen = np.maximum(self._alone[layer][rows], 4)  # a row seen once knows nothing
        share = (together[rows] / seen[:, None]).mean(axis=0)
        order = np.argsort(-share, kind="stable")
        return [int(number) for number in order[: np.count_nonzero(share >= at_least)]]
