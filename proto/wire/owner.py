"""Whoever answers what comes in on connections."""

from typing import TYPE_CHECKING, Protocol

from .stream import Stream

if TYPE_CHECKING:
    from .connection import Connection


class Owner(Protocol):
    """Who answers the calls of a connection."""

    def made(self, connection: "Connection") -> None:
        """The connection is open; the owner may close it."""

    def called(self, connection: "Connection", stream: Stream) -> None:
        """A call has begun; `stream.fields` are the caller's headers."""

    def gone(self, connection: "Connection") -> None:
        """The connection is over."""
