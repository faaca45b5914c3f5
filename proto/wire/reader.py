"""Bytes cut into frames as they come: small frames out of one buffer, a large message where it will stay."""

import ctypes
import struct
from typing import Protocol

import grpc.aio

from . import frames
from .frames import (
    HEADER_BYTES,
    LARGEST_CONTROL_FRAME,
    LARGEST_FRAME,
    LARGEST_WINDOW,
    PREFACE,
    ErrorCode,
    FrameError,
)
from .messages import PREFIX_BYTES
from .stream import Stream

BUFFER_BYTES = 128 << 10
DIRECT_BYTES = 32 << 10  # of a message that are still missing: they are received where they will stay
FIRST_BYTES = 16 << 10  # of what follows a large message, often another one: little of it is to be moved then
MAX_HEADER_BYTES = 16 << 10


# The header of a DATA frame and a message's prefix: length in three bytes; type and flags, all zero; stream; whether
# it is compressed; length of the message.
_MESSAGE = struct.Struct(">HBHIBI")


class Frames(Protocol):
    """Who is told of frames; each method raises FrameError where the other side has broken the protocol."""

    def stream(self, number: int) -> Stream | None:
        """The stream of that number; None when it is over."""

    def count(self, length: int) -> None:
        """So many bytes of data came."""

    def refuse(self, stream: Stream, error: grpc.aio.AioRpcError) -> None:
        """A stream brings what is not taken."""

    def half_close(self, stream: Stream) -> None:
        """The other side has sent a stream's last message."""

    def take_headers(self, number: int, block: bytes, *, end: bool) -> None:
        """A whole header block came."""

    def take_frame(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        """A frame came that is neither data nor headers."""


class FrameReader:
    """What a connection receives."""

    def __init__(self, told: Frames, *, preface: bool) -> None:
        """`preface`: a caller's first bytes come before its frames."""
        self._told = told
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self.place = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer)), BUFFER_BYTES
        """The address and the bytes of its buffer."""
        self.filled = 0  # bytes that are in the buffer
        self._expected = len(PREFACE) if preface else 0
        self.missing = 0  # bytes of the DATA frame that is coming
        self._data_stream: Stream | None = None
        self._data_ends = False
        self._direct = False
        self._large = False  # the last bytes were a large message's
        self._headers: tuple[int, bool, bytearray] | None = None  # that CONTINUATION frames complete
        self.closed = False  # nothing is read any more

    @property
    def at_frame(self) -> bool:
        """Whether the buffer begins with a frame, or is empty."""
        return not (self._expected or self.missing) and self._headers is None

    def room(self) -> memoryview:
        """Where the next bytes belong."""
        stream = self._data_stream
        if self.missing >= DIRECT_BYTES and self.filled == 0 and stream is not None:
            room = stream.room
            if room is not None and len(room) >= DIRECT_BYTES:
                self._direct = True
                return room[: self.missing]
        self._direct = False
        return self._view[self.filled : self.filled + FIRST_BYTES if self._large else BUFFER_BYTES]

    def received(self, length: int) -> None:
        """So many bytes came there. Raises FrameError."""
        self._large = self._direct
        if not self._direct:
            self.filled += length
            self._read()
            return
        stream = self._data_stream
        assert stream is not None
        self.missing -= length
        self._told.count(length)
        stream.count(length)
        stream.filled(length)
        if self.missing == 0:
            self._data_done()

    def go_on(self, start: int, filled: int) -> None:
        """So many bytes are in the buffer, and those up to `start` are done with. Raises FrameError."""
        self.filled = filled
        if filled:
            self._read(start)

    def _read(self, start: int = 0) -> None:
        while not self.closed:
            rest = self.filled - start
            if self.missing:
                if not rest:
                    break
                part = self._view[start : start + min(rest, self.missing)]
                start += len(part)
                self.missing -= len(part)
                self._feed(self._data_stream, part, len(part))
                if self.missing == 0:
                    self._data_done()
                continue
            if self._expected:
                if rest < self._expected:
                    break
                if self._view[start : start + self._expected] != PREFACE:
                    raise FrameError(ErrorCode.PROTOCOL_ERROR, "The other side does not speak HTTP/2.")
                start, self._expected = start + self._expected, 0
                continue
            if rest >= _MESSAGE.size and self._headers is None and (taken := self._take_message(start, rest)):
                start += taken
                continue
            if rest < HEADER_BYTES:
                break
            high, low, kind, flags, number = struct.unpack_from(">HBBBI", self._view, start)
            length, number = high << 8 | low, number & LARGEST_WINDOW
            if self._headers is not None and (kind != frames.CONTINUATION or number != self._headers[0]):
                raise FrameError(ErrorCode.PROTOCOL_ERROR, "Headers were cut by another frame.")
            content = start + HEADER_BYTES
            if kind == frames.DATA and not flags & frames.PADDED:
                if length > LARGEST_FRAME:
                    raise FrameError(ErrorCode.FRAME_SIZE_ERROR, "A frame is too large.")
                stream = self._told.stream(number)
                start = content
                self._begin_data(stream, length, flags)
                continue
            if length > LARGEST_CONTROL_FRAME:
                raise FrameError(ErrorCode.FRAME_SIZE_ERROR, "A frame is too large.")
            if content + length > self.filled:
                break
            self._frame(kind, flags, number, self._view[content : content + length])
            start = content + length
        rest = self.filled - start
        if start and rest:
            self._buffer[:rest] = self._buffer[start : self.filled]
        self.filled = rest

    def _take_message(self, start: int, rest: int) -> int:
        """Takes a frame that is one whole message, as nearly all are; returns its bytes, 0 for another one."""
        high, low, kind_and_flags, number, compressed, size = _MESSAGE.unpack_from(self._view, start)
        total: int = _MESSAGE.size + size
        if kind_and_flags or compressed or total > rest or high << 8 | low != PREFIX_BYTES + size:
            return 0
        stream = self._told.stream(number & LARGEST_WINDOW)
        if stream is None or not stream.take_whole(self._view[start + _MESSAGE.size : start + total]):
            return 0
        self._told.count(PREFIX_BYTES + size)
        return total

    def _begin_data(self, stream: Stream | None, length: int, flags: int) -> None:
        if stream is not None and stream.half_closed:
            raise FrameError(ErrorCode.STREAM_CLOSED, "Data came after a stream's end.")
        self._data_stream, self.missing = stream, length
        self._data_ends = bool(flags & frames.END_STREAM)
        if length == 0:
            self._data_done()

    def _feed(self, stream: Stream | None, data: memoryview, counted: int) -> None:
        self._told.count(counted)
        if stream is None or stream.failure is not None:  # it was given up here
            return
        stream.count(counted)
        try:
            stream.feed(data)
        except grpc.aio.AioRpcError as error:
            self._data_stream = None  # the rest of the frame is nobody's
            self._told.refuse(stream, error)

    def _data_done(self) -> None:
        stream, self._data_stream = self._data_stream, None
        if stream is not None and self._data_ends:
            self._told.half_close(stream)

    def _frame(self, kind: int, flags: int, number: int, payload: memoryview) -> None:
        if kind == frames.DATA:  # a padded one
            stream = self._told.stream(number)
            self._begin_data(stream, 0, flags & ~frames.END_STREAM)
            self._feed(stream, frames.unpadded(payload, flags, priority=False), len(payload))
            if flags & frames.END_STREAM and stream is not None and stream.failure is None:
                self._told.half_close(stream)
            return
        if kind == frames.HEADERS:
            content = frames.unpadded(payload, flags, priority=True)
            self._headers = number, bool(flags & frames.END_STREAM), bytearray(content)
        elif kind == frames.CONTINUATION:
            if self._headers is None:
                raise FrameError(ErrorCode.PROTOCOL_ERROR, "Headers go on that never began.")
            self._headers[2].extend(payload)
        else:
            self._told.take_frame(kind, flags, number, payload)
            return
        number, end, block = self._headers
        if len(block) > MAX_HEADER_BYTES:
            raise FrameError(ErrorCode.ENHANCE_YOUR_CALM, "Headers are too large.")
        if flags & frames.END_HEADERS:
            self._headers = None
            self._told.take_headers(number, bytes(block), end=end)
