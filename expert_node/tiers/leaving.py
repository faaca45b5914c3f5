"""Who makes room: of the experts that nobody holds, the one that is used least."""

import heapq
import itertools

from .experts import DiskExpert


class Leaving:
    """Experts in RAM that may leave, by their counts. The caller sees to it that one thread is in here."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, DiskExpert]] = []
        self._order = itertools.count()

    def put(self, expert: DiskExpert) -> None:
        """From now on this one may leave; it may be in here already."""
        if not expert.in_heap:
            expert.in_heap = True
            heapq.heappush(self._heap, (expert.count, next(self._order), expert))

    def take(self) -> DiskExpert | None:
        """The one that is used least; None when all are held. It is not in here any more."""
        while self._heap:
            count, _, expert = heapq.heappop(self._heap)
            expert.in_heap = False
            if expert.weights is None or expert.held or expert.pinned:
                continue  # it is put here again when nobody holds it
            if expert.count == count:
                return expert
            self.put(expert)  # it was used meanwhile
        return None
