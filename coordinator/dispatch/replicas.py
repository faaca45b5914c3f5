"""Which of its holders computes each expert of a layer: the one that would finish first, then one augmenting pass.

The rule is research's: greedy by least finish time is within a few percent of the exact answer, and the pass that
follows takes most of the rest. It runs in native code (cpp/choice.h), a few microseconds for a batch
(`moehive bench dispatch`).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .native import address, library


class Holders:
    """Who can be asked for each expert of one layer. Not for two threads at a time."""

    def __init__(self, holders: npt.NDArray[np.int32], nodes: int) -> None:
        """`holders` [experts, one or more]: of each expert the nodes, all below `nodes`, then -1."""
        self.array = np.ascontiguousarray(holders)
        self._owner = np.empty(len(holders), dtype=np.int64)
        self._costs = np.empty((2, nodes))
        base = address(self._costs)
        self._before = (address(self.array), *holders.shape, base, base + 8 * nodes, nodes)
        self._after = address(self._owner)
        self._choose = library().moehive_choose

    def choose(
        self, ids: npt.NDArray[np.int64], by_pairs: bool, base: Sequence[float], per: Sequence[float]
    ) -> npt.NDArray[np.int64]:
        """A node [experts] for each expert that `ids` [tokens, k] name; others get their first holder, or -1.

        A node that is asked finishes `base` (round trip, work in hand) plus `per` times its experts' sizes after the
        start, seconds [nodes]; an expert's size is 1, or with `by_pairs` how often `ids` name it. The largest finish
        is what is kept small. Ids outside the experts mean none.
        """
        self._costs[:] = base, per
        ids = np.ascontiguousarray(ids)
        if self._choose(*self._before, address(ids), ids.size, by_pairs, self._after):
            raise MemoryError("There is no memory left to choose among replicas.")
        return self._owner.copy()
