"""One HTTP/2 connection, either end: streams, windows, pings.

Whatever ends the connection ends its streams with UNAVAILABLE.
"""

import asyncio
import ctypes
import logging
import socket
import struct
from collections.abc import Sequence

import grpc
import grpc.aio
import hpack

from ..native import library
from . import frames, status
from .frames import (
    FIRST_WINDOW,
    LARGEST_FRAME,
    LARGEST_WINDOW,
    LEAST_FRAME,
    PREFACE,
    ErrorCode,
    FrameError,
    frame,
    header,
)
from .keepalive import Keepalive
from .messages import COPIED_BYTES, PREFIX_BYTES, Buffer, prefix
from .owner import Owner
from .reader import MAX_HEADER_BYTES, FrameReader
from .status import ANSWER, Fields
from .stream import Stream
from .tls import OtherSide
from .transport import BROKEN, Transport, bytes_of
from .windows import HEAD_BYTES, Outlet, Sending, Served, Taker

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0  # for TLS's
MAX_UNSENT_REPLIES = 1000  # to pings and settings, while the other side reads nothing


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
        self.first_send_window = FIRST_WINDOW
        self.sending = Sending(window=FIRST_WINDOW, largest_frame=LEAST_FRAME)
        self.paused = False  # the transport has more than it wants
        self.lost: str | None = None  # why it is over, one sentence
        self.other_side = OtherSide()
        self.read_at = 0  # nanoseconds, `perf_counter_ns`: when the reading of the latest bytes began
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # the other side has answered
        self.going = False  # the other side takes no new streams
        self._owner = owner
        self._transport: Transport
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0 if owner is not None else -1  # the newest, whoever opened it
        self._unsent_replies = 0
        self._received = 0  # since this connection's window was credited
        self._encoder = hpack.Encoder()
        self._decoder = hpack.Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._reader = FrameReader(self, preface=owner is not None)
        self._progress: asyncio.Future[None] | None = None
        self._keepalive: Keepalive | None = None  # once it is connected
        self._taking: tuple[Stream, Taker] | None = None  # the stream whose messages are taken natively
        self._served = Served()
        self._places = ctypes.addressof(self.sending), ctypes.addressof(self._served)
        self._native_serve = library().moehive_serve

    # The transport's side.

    def connection_made(self, transport: Transport) -> None:
        """See Told."""
        self._transport = transport
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
        self._keepalive = Keepalive(self._ping, self._dead)
        if self._owner is not None:
            self._owner.made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See Told."""
        self.close(f"The connection broke ({exc})." if exc is not None else "The other side ended the connection.")

    def serve(self) -> int | None:
        """See Told."""
        if self._taking is None:
            return None
        stream, taker = self._taking
        reader, served = self._reader, self._served
        # A stream that this end has ended is none of the connection's any more, whatever still comes on it.
        if stream.number not in self._streams or not (reader.at_frame and stream.between and taker.ready()):
            return None
        assert self._keepalive is not None
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
        )
        taker.took(served.messages)
        if got > 0:
            self._keepalive.quiet_ticks = 0
            if served.messages:
                self.count(served.taken)
                stream.owe(served.taken)
            if served.refused:
                stream.send((ctypes.string_at(served.unsent_at, served.unsent),))
            elif served.unsent_at and self.sending.waiting:
                self._transport.later(ctypes.string_at(served.unsent_at, served.unsent))
            if served.kept or served.consumed == served.filled:
                reader.filled = served.filled - served.consumed
            elif self.lost is None:
                self.read_at = stream.times.read_at
                self._read(served.consumed, served.filled)
        return got

    def get_buffer(self, sizehint: int) -> memoryview:
        """See Told."""
        return self._reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        """See Told."""
        assert self._keepalive is not None
        self._keepalive.quiet_ticks = 0
        self._read(None, nbytes)

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
        self.paused = True

    def resume_writing(self) -> None:
        """See Told."""
        self.paused = False
        self._unsent_replies = 0
        self._advance()

    # Streams' side.

    def open(self, fields: Fields) -> Stream:
        """Begins a call with these headers. Raises AioRpcError when the connection takes none any more."""
        if self.lost is not None or self.going:
            raise status.error(grpc.StatusCode.UNAVAILABLE, self.lost or "The other side is ending.")
        self._last_stream += 2
        stream = self._streams[self._last_stream] = Stream(self, self._last_stream)
        self._send_headers(stream, fields, end=False)
        return stream

    def answer(self, stream: Stream) -> None:
        """Sends the headers that come before an answer's messages."""
        if stream.number in self._streams:
            stream.answered = True
            self._send_headers(stream, ANSWER, end=False)

    def send(self, stream: Stream, message: Sequence[Buffer]) -> None:
        """See Stream.send."""
        length = sum(map(len, message))
        total = PREFIX_BYTES + length
        windows, sending = stream.windows, self.sending
        fits = total <= windows.send and total <= sending.window and total <= sending.largest_frame
        if fits and not stream.outgoing:
            windows.send -= total
            sending.window -= total
            # A frame's header and a message's prefix at once.
            head = struct.pack(">HBHIBI", total >> 8, total & 0xFF, frames.DATA << 8, stream.number, 0, length)
            if length <= COPIED_BYTES:
                self._transport.write(b"".join((head, *message)))
            else:
                self._transport.writelines((head, *message))
            return
        stream.outgoing.extend(memoryview(piece) for piece in (prefix(length), *message) if len(piece))
        self._pump(stream)

    def outlet(self, stream: Stream) -> Outlet:
        """See Stream.outlet."""
        function = ctypes.cast(library().moehive_send, ctypes.c_void_p).value or 0
        return Outlet(function, self._places[0], stream.windows_at)

    def sent_natively(self, stream: Stream, where: int, size: int, taken: int) -> None:
        """See Stream.sent_natively."""
        if taken == BROKEN:
            if self.lost is None:
                self._transport.broke()
        elif taken < 0:
            self.send(stream, (ctypes.string_at(where, size),))
        else:
            left = bytes_of(taken)
            self._transport.later(ctypes.string_at(where - HEAD_BYTES + left, HEAD_BYTES + size - left))

    def take_natively(self, stream: Stream, taker: Taker) -> None:
        """See Stream.take_natively."""
        if stream.number in self._streams:
            self._taking = stream, taker

    def end(self, stream: Stream, trailers: Sequence[tuple[str, str]] | None) -> None:
        """See Stream.end."""
        if stream.number not in self._streams:
            return
        if trailers is None:
            if not stream.outgoing:  # else the last of it says so
                self._transport.write(frame(frames.DATA, frames.END_STREAM, stream.number))
            return
        if stream.outgoing:  # who answers has awaited `drain`, or gives the rest up
            self.drop(stream, ErrorCode.INTERNAL_ERROR)
            return
        begin = [] if stream.answered else ANSWER  # a call that fails at once has but one block of headers
        self._send_headers(stream, [*begin, *trailers], end=True)
        # No RST_STREAM to a caller that is still sending: it could miss the trailers. What comes is dropped.
        self._streams.pop(stream.number, None)

    def drop(self, stream: Stream, code: ErrorCode) -> None:
        """Ends a stream at once."""
        if self._streams.pop(stream.number, None) is not None and self.lost is None:
            self._transport.write(frames.reset(stream.number, code))

    def credit(self, stream: Stream, length: int) -> None:
        """So many bytes of a stream were read."""
        if stream.number in self._streams:
            self._transport.write(frames.window_update(stream.number, length))

    async def progress(self) -> None:
        """Returns when something more could be sent, or the connection is over."""
        if self.lost is not None:
            return
        if self._progress is None:
            self._progress = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._progress)

    def sent_from(self) -> int:
        """See Stream.sent_from. Linux only: loopback hands bytes over on the sender's processor."""
        if not hasattr(socket, "SO_INCOMING_CPU"):
            return -1
        try:
            return self._transport.socket.getsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU)
        except OSError:
            return -1

    def say_goodbye(self) -> None:
        """Takes no new streams."""
        if self.lost is None:
            self._transport.write(frames.go_away(max(self._last_stream, 0), ErrorCode.NO_ERROR))

    # The reader's side.

    def stream(self, number: int) -> Stream | None:
        """See Frames."""
        stream = self._streams.get(number)
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
            self._streams.pop(stream.number, None)
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
            stream = self._streams[number] = Stream(self, number)
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
                del self._streams[number]
                stream.fail(status.of_reset(code))
                self._advance()
        elif kind == frames.SETTINGS:
            self._take_settings(flags, payload)
        elif kind == frames.PING:
            if len(payload) != 8:
                raise FrameError(ErrorCode.FRAME_SIZE_ERROR, "A ping has eight bytes.")
            if not flags & frames.ACK:
                self._reply(frame(frames.PING, frames.ACK, 0, bytes(payload)))
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
            if key == frames.INITIAL_WINDOW_SIZE:
                if value > LARGEST_WINDOW:
                    raise FrameError(ErrorCode.FLOW_CONTROL_ERROR, "A window is too large.")
                for stream in self._streams.values():
                    stream.windows.send += value - self.first_send_window
                self.first_send_window = value
            elif key == frames.MAX_FRAME_SIZE:
                if not LEAST_FRAME <= value <= LARGEST_FRAME:
                    raise FrameError(ErrorCode.PROTOCOL_ERROR, "A frame can't be of the size announced.")
                self.sending.largest_frame = value
            elif key == frames.HEADER_TABLE_SIZE:
                self._encoder.header_table_size = min(value, 4096)
        self._reply(frame(frames.SETTINGS, frames.ACK, 0))
        if not self.ready.done():
            self.ready.set_result(None)
        self._pump_all()

    def _take_window(self, number: int, credit: int) -> None:
        if credit == 0:
            raise FrameError(ErrorCode.PROTOCOL_ERROR, "A window grew by nothing.")
        if number == 0:
            self.sending.window += credit
            if self.sending.window > LARGEST_WINDOW:
                raise FrameError(ErrorCode.FLOW_CONTROL_ERROR, "A window is too large.")
            self._pump_all()
            return
        stream = self.stream(number)
        if stream is None:
            return
        stream.windows.send += credit
        if stream.windows.send > LARGEST_WINDOW:
            raise FrameError(ErrorCode.FLOW_CONTROL_ERROR, "A window is too large.")
        self._pump(stream)

    # Sending.

    def _send_headers(self, stream: Stream, fields: Fields, *, end: bool) -> None:
        block = self._encoder.encode(fields, huffman=False)  # in Python it takes longer than the bytes it saves
        self._transport.write(frames.headers(stream.number, block, self.sending.largest_frame, end=end))

    def _pump_all(self) -> None:
        for stream in list(self._streams.values()):
            if stream.outgoing:
                self._pump(stream)

    def _pump(self, stream: Stream) -> None:
        """Sends what the windows let through of what waits."""
        while stream.outgoing:
            room = min(stream.windows.send, self.sending.window, self.sending.largest_frame)
            if room <= 0:
                return
            pieces: list[Buffer] = []
            length = 0
            while stream.outgoing and length < room:
                piece = stream.outgoing.popleft()
                if len(piece) > room - length:
                    stream.outgoing.appendleft(piece[room - length :])
                    piece = piece[: room - length]
                pieces.append(piece)
                length += len(piece)
            stream.windows.send -= length
            self.sending.window -= length
            flags = frames.END_STREAM if stream.closed and not stream.outgoing else 0
            self._transport.writelines((header(length, frames.DATA, flags, stream.number), *pieces))
        self._advance()

    def _reply(self, data: bytes) -> None:
        if self.paused:
            self._unsent_replies += 1
            if self._unsent_replies > MAX_UNSENT_REPLIES:
                raise FrameError(ErrorCode.ENHANCE_YOUR_CALM, "The other side asks and does not listen.")
        self._transport.write(data)

    def _advance(self) -> None:
        if self._progress is not None:
            self._progress.set_result(None)
            self._progress = None

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
        self._taking = None
        if self._keepalive is not None:
            self._keepalive.stop()
        if code is not ErrorCode.NO_ERROR:
            log.warning("A connection is ended: %s", why)
            self._transport.write(frames.go_away(max(self._last_stream, 0), code, why))
        self._transport.close()
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.fail(status.error(grpc.StatusCode.UNAVAILABLE, why))
        if not self.ready.done():
            self.ready.set_result(None)
        self._advance()
        if self._owner is not None:
            self._owner.gone(self)
