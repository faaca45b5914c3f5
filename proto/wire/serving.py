"""Messages of a connection's busiest stream, taken and answered natively as they are read (cpp/messages.cc).

They are read when the event loop says so, or when native code that waits for one looks itself: by way of an inlet.
"""

import ctypes
from typing import Protocol

from ..native import library
from .keepalive import Keepalive
from .reader import FrameReader
from .sender import Sender
from .stream import Stream
from .windows import Inlet, Served, Taker


class UsualWay(Protocol):
    """The connection, which goes on with what is not taken."""

    streams: dict[int, Stream]  # that are not over

    def count(self, length: int) -> None:
        """So many bytes of data came."""

    def read(self) -> None:
        """Reads what has come."""

    def read_on(self, start: int, filled: int, read_at: int) -> None:
        """So many bytes, read at that time, are in the reader's buffer; those up to `start` are done with."""


class Serving:
    """Of one connection. Whatever is not taken goes the connection's usual way, in the order in which it came."""

    def __init__(self, connection: UsualWay, reader: FrameReader, sender: Sender, keepalive: Keepalive) -> None:
        self._connection = connection
        self._streams = connection.streams
        self._count = connection.count
        self._reader = reader
        self._sender = sender
        self._sending = sender.sending
        self._keepalive = keepalive
        self._taking: tuple[Stream, Taker] | None = None  # the stream whose messages are taken
        self._served = Served()
        self._places = ctypes.addressof(self._sending), ctypes.addressof(self._served)
        self._native_serve = library().moehive_serve_on
        self._inlet: Inlet | None = None

    def take(self, stream: Stream, taker: Taker) -> None:
        """See Stream.take_natively."""
        if stream.number in self._streams:
            self._taking = stream, taker

    def inlet(self, descriptor: int) -> Inlet:
        """See Stream.inlet; `descriptor` of the connection's socket."""
        assert self._taking is not None
        stream, taker = self._taking
        sending, served = self._places
        buffer, room = self._reader.place
        self._inlet = Inlet(
            serve=ctypes.cast(library().moehive_serve, ctypes.c_void_p).value,
            sending=sending,
            windows=stream.windows_at,
            times=stream.times_at,
            take=taker.function,
            taker=taker.context,
            buffer=buffer,
            served=served,
            room=room,
            descriptor=descriptor,
        )
        self.settle()
        return self._inlet

    def settle(self) -> None:
        """Counts what the inlet has taken, and says whether it may read: what came is not the connection's."""
        inlet = self._inlet
        if inlet is None:
            return
        if self._taking is None:
            inlet.usual = 0
            return
        stream, reader = self._taking[0], self._reader
        if inlet.taken:
            self._keepalive.quiet_ticks = 0
            self._count(inlet.taken)
            stream.owe(inlet.taken)
            inlet.taken = 0
        known = stream.number in self._streams
        inlet.usual = known and stream.between and reader.at_frame and not reader.filled

    def go_on(self) -> None:
        """Does the rest of what the inlet has read, if it has left something to the connection."""
        inlet = self._inlet
        if inlet is None or inlet.usual:
            return
        got, inlet.got = inlet.got, 0
        if got and self._taking is not None:
            self._finish(got)
        self._connection.read()

    def end(self) -> None:
        """The connection is over."""
        self._taking = None
        self.settle()

    def serve(self) -> int | None:
        """See Told."""
        if self._taking is None:
            return None
        stream, taker = self._taking
        reader = self._reader
        # A stream that this end has ended is none of the connection's any more, whatever still comes on it.
        if stream.number not in self._streams or not (reader.at_frame and stream.between and taker.ready()):
            return None
        sending, found = self._places
        got: int = self._native_serve(
            sending,
            stream.windows_at,
            stream.times_at,
            taker.function,
            taker.context,
            *reader.place,
            reader.filled,
            found,
            *taker.patience,
        )
        self._finish(got)
        return got

    def _finish(self, got: int) -> None:
        """Does what is left to do about a reading that returned `got`."""
        assert self._taking is not None
        stream, taker = self._taking
        reader, served = self._reader, self._served
        taker.took(served.messages)
        if got > 0:
            self._keepalive.quiet_ticks = 0
            if served.messages:
                self._count(served.taken)
                stream.owe(served.taken)
            if served.refused:
                stream.send((ctypes.string_at(served.unsent_at, served.unsent),))
            elif served.unsent_at and self._sending.waiting:
                self._sender.later(served.unsent_at, served.unsent)
            if served.kept or served.consumed == served.filled:
                reader.filled = served.filled - served.consumed
            elif not reader.closed:
                self._connection.read_on(served.consumed, served.filled, stream.times.read_at)
            self.settle()
