"""Who runs, and when.

Every admitted sequence runs at once: its forward pass awaits at each MoE layer, so the loop deals out turns layer
by layer and no sequence waits for another's end. What is decided here is only who is admitted.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from ..types import NoRoom
from .kvcache import KVBudget, readable


@dataclass(eq=False, slots=True)
class _Waiting:
    owner: str
    nbytes: int
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Scheduler:
    """Admission by KV cache, first come first served."""

    def __init__(self, budget: KVBudget, max_waiting: int) -> None:
        self.budget = budget
        self._max_waiting = max_waiting
        self._line: deque[_Waiting] = deque()

    @property
    def waiting(self) -> int:
        """Sequences in line."""
        return len(self._line)

    async def admit(self, owner: str, nbytes: int) -> None:
        """Returns once `owner` holds `nbytes` of KV cache; `leave` gives them back.

        Raises NoRoom at once when they could never fit, or when too many wait already. When cancelled, nothing is
        held and nobody behind is held up.
        """
        self.budget.check_fits_alone(nbytes)
        if not self._line and self.budget.reserve(owner, nbytes):
            return
        if len(self._line) >= self._max_waiting:
            raise NoRoom(
                f"This generation needs {readable(nbytes)} of KV cache, {readable(self.budget.free_bytes)} are free "
                f"and {len(self._line)} generations wait already; try again later."
            )
        waiting = _Waiting(owner, nbytes)
        self._line.append(waiting)
        try:
            await waiting.admitted
        except asyncio.CancelledError:
            if not waiting.admitted.cancelled():  # admitted and cancelled in the same turn of the loop
                self.budget.release(owner)
            elif waiting in self._line:
                self._line.remove(waiting)
            self._admit_next()
            raise

    def grow(self, owner: str, nbytes: int) -> bool:
        """Raises a running sequence's reservation to `nbytes`, ahead of those in line; False without room."""
        return self.budget.reserve(owner, nbytes)

    def leave(self, owner: str) -> None:
        """A sequence is done: its bytes go to those in line."""
        self.budget.release(owner)
        self._admit_next()

    def _admit_next(self) -> None:
        # The one in front is never overtaken, or a large sequence could wait for ever behind small ones.
        while self._line:
            first = self._line[0]
            if first.admitted.cancelled():  # its task has not run yet to leave the line itself
                self._line.popleft()
            elif self.budget.reserve(first.owner, first.nbytes):
                self._line.popleft().admitted.set_result(None)
            else:
                return
