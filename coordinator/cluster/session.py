"""One node's control stream as membership sees it: directives go in, the service sends them.

A session ends once, for one reason, whoever ends it: the node that closes its stream, silence, a second stream of
the same node, the coordinator's end.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TypeAlias

from ..types import CoordinatorError, NodeName, Pins

MAX_UNSENT = 64  # directives; a node that reads none of so many is not following


@dataclass(frozen=True, slots=True)
class Assign:
    """Hold these experts, in addition to the present ones; `layers` has a tuple of experts for each layer.

    `pins`: those among them that stay in a fast tier; None: none.
    """

    epoch: int
    layers: tuple[tuple[int, ...], ...]
    pins: Pins | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """Requests are dispatched by this epoch now: what it does not need may be dropped."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Released:
    """The node may stop."""


Direction: TypeAlias = Assign | Commit | Released


class SessionEnded(CoordinatorError):
    """The control stream was ended by the coordinator; the sentence says why."""


class Session:
    """Made by `Membership.arrive`; used on the event loop's thread only."""

    def __init__(self, name: NodeName, now: float) -> None:
        self.name = name
        self.last_seen = now  # seconds of the loop's clock
        self.committed = 0  # epoch of the last Commit that was sent
        self.released = False
        self._queue: asyncio.Queue[Direction | None] = asyncio.Queue()
        self._end: SessionEnded | None = None
        self._ended = False

    def send(self, direction: Direction) -> None:
        """Queues a directive; ends the session instead when the node does not read them."""
        if self._queue.qsize() >= MAX_UNSENT:
            self.end(f"Node {self.name} does not read its directives; it has to connect again.")
        elif not self._ended:
            self._queue.put_nowait(direction)

    def end(self, sentence: str | None = None) -> None:
        """Ends the session after what is queued; with a sentence, as an error that the node is told."""
        if not self._ended:
            self._ended = True
            self._end = SessionEnded(sentence) if sentence else None
            self._queue.put_nowait(None)

    async def directions(self) -> AsyncIterator[Direction]:
        """What to send, until the session ends. Raises SessionEnded when the coordinator ended it."""
        while (direction := await self._queue.get()) is not None:
            yield direction
        if self._end is not None:
            raise self._end
