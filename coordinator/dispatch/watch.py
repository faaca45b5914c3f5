"""Deadlines of the requests in flight, looked at together: a timer for each would cost more than the request's share.

A loop that was held up itself has replies that it has not read yet: then every deadline is moved by as much, and
nobody is blamed.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

TICK_SECONDS = 0.02
SLACK_SECONDS = 0.05  # beyond three times the expected time, a node with replicas is late
SILENT_SECONDS = 1.0  # beyond that, one without replicas
FIRST_SECONDS = 10.0  # for a request of which nothing is known: the node's first, its memory cold


class Due(Protocol):
    """Something with a deadline, seconds of the loop's clock."""

    due: float


class Watch:
    """Calls `overdue` with each thing whose time is over, every TICK_SECONDS until it is removed or put off."""

    def __init__(self, overdue: Callable[[Due], None]) -> None:
        self._overdue = overdue
        self._things: dict[int, Due] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wake_at = 0.0

    def add(self, thing: Due) -> None:
        """Watches `thing`; on the event loop."""
        self._things[id(thing)] = thing
        if self._timer is None:
            self._arm(asyncio.get_running_loop())

    def remove(self, thing: Due) -> None:
        """Forgets `thing`, if it is still watched."""
        self._things.pop(id(thing), None)

    @property
    def active(self) -> bool:
        """Whether anything was watched within the last TICK_SECONDS."""
        return self._timer is not None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._wake_at = loop.time() + TICK_SECONDS
        self._timer = loop.call_later(TICK_SECONDS, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        late = now - self._wake_at
        for thing in list(self._things.values()):
            if late > TICK_SECONDS:
                thing.due += late
            elif thing.due < now:
                self._overdue(thing)
        if self._things:
            self._arm(loop)
