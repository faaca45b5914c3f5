"""One HTTP/2 connection, either end: its streams, what comes on it, settings, pings.

Whatever ends the connection ends its streams with UNAVAILABLE.
"""

import asyncio
import logging
import struct
from collections.abc import Sequence
from typing import Protocol

import grpc
import grpc.aio
import hpack

from . import frames, status
from .frames import FIRST_WINDOW, LARGEST_FRAME, LARGEST_WINDOW, PREFACE, ErrorCode, FrameError, frame
from .keepalive import Keepalive
from .reader import MAX_HEADER_BYTES, FrameReader
from .sender import Sender
from .serving import Serving
from .status import ANSWER, Fields
from .stream import Stream
from .tls import OtherSide
from .transport import Transport
from .windows import Inlet

log = logging.getLogger(__name__)


class Owner(Protocol):
    """Who answers the calls of a connection."""

    def made(self, connection: "Connection") -> None:
        """The connection is open; the owner may close it."""

    def called(self, connection: "Connection", stream: Stream) -> None:
        """A call has begun; `stream.fields` are the caller's headers."""

    def gone(self, connection: "Connection") -> None:
        """The connection is over."""


class Connection:
    """Use it on one event loop. Its transport tells it of bytes as asyncio's tell a BufferedProtocol."""

    def __init__(self, max_bytes: int, window_bytes: int | None = None, owner: Owner | None = None) -> None:
        """`max_bytes` of a message, `window_bytes` that a stream may bring before they are read: more than that.

        `owner` answers the calls that come in; None: this end is the caller.
        """
        window_bytes = window_bytes or max_bytes + max_bytes // 4
        assert window_bytes > max_bytes + window_bytes // 8
        self.max_bytes = max_bytes
        self.window_bytes = window_bytes
        self.streams: dict[int, Stream] = {}  # that are not over
        self.sender = Sender()
        self.sending = self.sender.sending  # see Told
        self.lost: str | None = None  # why it is over, one sentence
        self.other_side = OtherSide()
        self.read_at = 0  # nanoseconds, `perf_counter_ns`: when the reading of the latest bytes began
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # the other side has answered
        self.going = False  # the other side takes no new streams
        self._owner = owner
        self._transport: Transport
        self._last_stream = 0 if owner is not None else -1  # the newest, whoever opened it
        self._received = 0  # since this connection's window was credited
        self._decoder = hpack.Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._reader = FrameReader(self, preface=owner is not None)
        self._keepalive = Keepalive(self._ping, self._dead)
        self.serving = Serving(self, self._reader, self.sender, self._keepalive)
        self.serve = self.serving.serve  # see Told; nothing lies between, for each message of decoding comes here

    # The transport's side.

    def connection_made(self, transport: Transport) -> None:
        """See Told."""
        self._transport = self.sender.transport = transport
        if not transport.speaks_http2():
            self.close("The other side does not speak HTTP/2.", ErrorCode.PROTOCOL_ERROR)
            return
        self.other_side = transport.other_side()
        values = {
            frames.INITIAL_WINDOW_SIZE: self.window_bytes,
            frames.MAX_FRAME_SIZE: LARGEST_FRAME,
            frames.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
        }
        if self._owner is None:
            values[frames.ENABLE_PUSH] = 0
        opening = frames.settings(values) + frames.window_update(0, LARGEST_WINDOW - FIRST_WINDOW)
        transport.write(opening if self._owner is not None else PREFACE + opening)
        if self._owner is not None:
            self._owner.made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See Told."""
        self.close(f"The connection broke ({exc})." if exc is not None else "The other side ended the connection.")

    def get_buffer(self, sizehint: int) -> memoryview:
        """See Told."""
        return self._reader.room()

    @property
    def missing(self) -> int:
        """See Told."""
        return self._reader.missing

    def buffer_updated(self, nbytes: int) -> None:
        """See Told."""
        self._keepalive.quiet_ticks = 0
        self._read(None, nbytes)
        self.serving.settle()

    def read(self) -> None:
        """Reads what has come."""
        self._transport.read()

    def read_on(self, start: int, filled: int, read_at: int) -> None:
        """So many bytes, read at that time, are in the reader's buffer; those up to `start` are done with."""
        self.read_at = read_at
        self._read(start, filled)

    def _read(self, start: int | None, nbytes: int) -> None:
        """`nbytes` came into the reader's room; with a `start`, the first of them are done with."""
        try:
            if start is None:
                self._reader.received(nbytes)
            else:
                self._reader.go_on(start, nbytes)
        except FrameError as error:
            self.close(str(error), error.code)
        except hpack.HPACKError:
            self.close("The other side's headers can't be read.", ErrorCode.COMPRESSION_ERROR)

    def pause_writing(self) -> None:
        """See Told."""
        self.sender.paused = True

    def resume_writing(self) -> None:
        """See Told."""
        self.sender.resume()

    # Streams' side.

    def open(self, fields: Fields) -> Stream:
        """Begins a call with these headers. Raises AioRpcError when the connection takes none any more."""
        if self.lost is not None or self.going:
            raise status.error(grpc.StatusCode.UNAVAILABLE, self.lost or "The other side is ending.")
        self._last_stream += 2
        stream = self.streams[self._last_stream] = Stream(self, self._last_stream)
        self.sender.headers(stream, fields, end=False)
        return stream

    def answer(self, stream: Stream) -> None:
        """Sends the headers that come before an answer's messages."""
        if stream.number in self.streams:
            stream.answered = True
            self.sender.headers(stream, ANSWER, end=False)

    def end(self, stream: Stream, trailers: Sequence[tuple[str, str]] | None) -> None:
        """See Stream.end."""
        if stream.number not in self.streams:
            return
        if trailers is None:
            if not stream.outgoing:  # else the last of it says so
                self._transport.write(frame(frames.DATA, frames.END_STREAM, stream.number))
            return
        if stream.outgoing:  # who answers has awaited `drain`, or gives the rest up
            self.drop(stream, ErrorCode.INTERNAL_ERROR)
            return
        begin = [] if stream.answered else ANSWER  # a call that fails at once has but one block of headers
        self.sender.headers(stream, [*begin, *trailers], end=True)
        # No RST_STREAM to a caller that is still sending: it could miss the trailers. What comes is dropped.
        self.streams.pop(stream.number, None)

    def drop(self, stream: Stream, code: ErrorCode) -> None:
        """Ends a stream at once."""
        if self.streams.pop(stream.number, None) is not None and self.lost is None:
            self._transport.write(frames.reset(stream.number, code))
        self.sender.give_up(stream)

    def credit(self, stream: Stream, length: int) -> None:
        """So many bytes of a stream were read."""
        if stream.number in self.streams:
            self._transport.write(frames.window_update(stream.number, length))

    def inlet(self) -> Inlet:
        """See Stream.inlet."""
        return self.serving.inlet(self._transport.socket.fileno())

    def say_goodbye(self) -> None:
        """Takes no new streams."""
        if self.lost is None:
            self._transport.write(frames.go_away(max(self._last_stream, 0), ErrorCode.NO_ERROR))

    # The reader's side.

    def stream(self, number: int) -> Stream | None:
        """See Frames."""
        stream = self.streams.get(number)
        if stream is None and (number == 0 or number > self._last_stream or number % 2 == 0):
            raise FrameError(ErrorCode.PROTOCOL_ERROR, "A frame is of a stream that never was.")
        return stream

    def count(self, length: int) -> None:
        """See Frames."""
        self._received += length
        if self._received > LARGEST_WINDOW // 2:
            self._transport.write(frames.window_update(0, self._received))
            self._received = 0

    def refuse(self, stream: Stream, error: grpc.aio.AioRpcError) -> None:
        """See Frames."""
        if self._owner is not None:
            stream.end(status.trailers(error.code(), error.details() or ""))
        self.drop(stream, ErrorCode.CANCEL)
        stream.fail(error)

    def half_close(self, stream: Stream) -> None:
        """See Frames."""
        if self._owner is None:  # who answers has said all, so there is nothing more to ask either
            self.streams.pop(stream.number, None)
            stream.closed = True
            self.sender.give_up(stream)
            if not stream.fields and stream.failure is None:
                stream.fail(status.error(grpc.StatusCode.INTERNAL, "The answer ended without a status."))
        stream.half_close()

    def take_headers(self, number: int, block: bytes, *, end: bool) -> None:
        """See Frames."""
        fields: Fields = [
            (bytes(name).decode("ascii", "replace"), bytes(value).decode("ascii", "replace"))
            for name, value in self._decoder.decode(block, raw=True)
        ]
        if self._owner is not None and number > self._last_stream:
            if number % 2 == 0:
                raise FrameError(ErrorCode.PROTOCOL_ERROR, "A caller's streams have odd numbers.")
            self._last_stream = number
            stream = self.streams[number] = Stream(self, number)
            stream.fields = fields
            self._owner.called(self, stream)
        else:
            known = self.stream(number)
            if known is None:
                return
            stream = known
            if self._owner is None:
                if (end or stream.fields) and (failure := status.of_headers(fields)) is not None:
                    stream.fail(failure)
                stream.fields = stream.fields or fields
        if end:
            self.half_close(stream)

    def take_frame(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        """See Frames."""
        if kind == frames.RST_STREAM:
            code = frames.number(payload)
            stream = self.stream(number)
            if stream is not None:
                del self.streams[number]
                stream.fail(status.of_reset(code))
                self.sender.advance()
        elif kind == frames.SETTINGS:
            self._take_settings(flags, payload)
        elif kind == frames.PING:
            if len(payload) != 8:
                raise FrameError(ErrorCode.FRAME_SIZE_ERROR, "A ping has eight bytes.")
            if not flags & frames.ACK:
                self.sender.reply(frame(frames.PING, frames.ACK, 0, bytes(payload)))
        elif kind == frames.GOAWAY:
            self.going = True
        elif kind == frames.WINDOW_UPDATE:
            self._take_window(number, frames.number(payload) & LARGEST_WINDOW)
        elif kind == frames.PUSH_PROMISE:
            raise FrameError(ErrorCode.PROTOCOL_ERROR, "Nothing is to be pushed.")

    def _take_settings(self, flags: int, payload: memoryview) -> None:
        if flags & frames.ACK:
            return
        if len(payload) % 6:
            raise FrameError(ErrorCode.FRAME_SIZE_ERROR, "Settings are cut.")
        for key, value in struct.iter_unpack(">HI", payload):
            self.sender.take_setting(key, value, self.streams.values())
        self.sender.reply(frame(frames.SETTINGS, frames.ACK, 0))
        if not self.ready.done():
            self.ready.set_result(None)
        self.sender.pump_all(self.streams.values())

    def _take_window(self, number: int, credit: int) -> None:
        if credit == 0:
            raise FrameError(ErrorCode.PROTOCOL_ERROR, "A window grew by nothing.")
        if number == 0:
            self.sender.grow(credit, self.streams.values())
        elif (stream := self.stream(number)) is not None:
            self.sender.grow_stream(credit, stream)

    def _ping(self) -> None:
        self._transport.write(frame(frames.PING, 0, 0, bytes(8)))

    def _dead(self, why: str) -> None:
        self.close(why)
        self._transport.abort()

    def close(self, why: str, code: ErrorCode = ErrorCode.NO_ERROR) -> None:
        """Ends it, and its streams with `why`, one sentence; what was sent before still leaves.

        With a `code` the other side is told that it has broken the protocol.
        """
        if self.lost is not None:
            return
        self.lost = why
        self._reader.closed = True
        self.serving.end()
        self._keepalive.stop()
        if code is not ErrorCode.NO_ERROR:
            log.warning("A connection is ended: %s", why)
            self._transport.write(frames.go_away(max(self._last_stream, 0), code, why))
        self._transport.close()
        self.sender.end()
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            stream.fail(status.error(grpc.StatusCode.UNAVAILABLE, why))
        if not self.ready.done():
            self.ready.set_result(None)
        if self._owner is not None:
            self._owner.gone(self)
