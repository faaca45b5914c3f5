"""What a connection sends: headers, and messages as the other side's windows let them through (RFC 9113, 5.2)."""

import asyncio
import ctypes
import struct
from collections.abc import Iterable, Sequence

import hpack

from ..native import library
from . import frames
from .frames import FIRST_WINDOW, LARGEST_FRAME, LARGEST_WINDOW, LEAST_FRAME, ErrorCode, FrameError, header
from .messages import COPIED_BYTES, PREFIX_BYTES, Buffer, prefix
from .status import Fields
from .stream import Stream
from .transport import BROKEN, Transport, bytes_of
from .windows import HEAD_BYTES, Outlet, Sending

MAX_UNSENT_REPLIES = 1000  # to pings and settings, while the other side reads nothing


class Sender:
    """Of one connection, on whose event loop it is used."""

    def __init__(self) -> None:
        self.sending = Sending(window=FIRST_WINDOW, largest_frame=LEAST_FRAME)
        self.first_window = FIRST_WINDOW  # of a new stream
        self.paused = False  # the transport has more than it wants
        self.over = False
        self.transport: Transport
        self._sending_at = ctypes.addressof(self.sending)
        self._unsent_replies = 0
        self._encoder = hpack.Encoder()
        self._progress: asyncio.Future[None] | None = None

    def headers(self, stream: Stream, fields: Fields, *, end: bool) -> None:
        """Sends a stream's headers, or its trailers."""
        block = self._encoder.encode(fields, huffman=False)  # in Python it takes longer than the bytes it saves
        self.transport.write(frames.headers(stream.number, block, self.sending.largest_frame, end=end))

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
                self.transport.write(b"".join((head, *message)))
            else:
                self.transport.writelines((head, *message))
            return
        stream.outgoing.extend(memoryview(piece) for piece in (prefix(length), *message) if len(piece))
        self.pump(stream)

    def outlet(self, stream: Stream) -> Outlet:
        """See Stream.outlet."""
        function = ctypes.cast(library().moehive_send, ctypes.c_void_p).value or 0
        return Outlet(function, self._sending_at, stream.windows_at)

    def sent_natively(self, stream: Stream, where: int, size: int, taken: int) -> None:
        """See Stream.sent_natively."""
        if taken == BROKEN:
            if not self.over:
                self.transport.broke()
        elif taken < 0:
            self.send(stream, (ctypes.string_at(where, size),))
        else:
            left = bytes_of(taken)
            self.later(where - HEAD_BYTES + left, HEAD_BYTES + size - left)

    def later(self, where: int, size: int) -> None:
        """Sends what native code has begun to send, when the socket takes more: the bytes left, at an address."""
        self.transport.later(ctypes.string_at(where, size))

    def reply(self, data: bytes) -> None:
        """Answers a ping or settings. Raises FrameError."""
        if self.paused:
            self._unsent_replies += 1
            if self._unsent_replies > MAX_UNSENT_REPLIES:
                raise FrameError(ErrorCode.ENHANCE_YOUR_CALM, "The other side asks and does not listen.")
        self.transport.write(data)

    # What the other side takes.

    def take_setting(self, key: int, value: int, streams: Iterable[Stream]) -> None:
        """The other side has set a limit. Raises FrameError."""
        if key == frames.INITIAL_WINDOW_SIZE:
            if value > LARGEST_WINDOW:
                raise FrameError(ErrorCode.FLOW_CONTROL_ERROR, "A window is too large.")
            for stream in streams:
                stream.windows.send += value - self.first_window
            self.first_window = value
        elif key == frames.MAX_FRAME_SIZE:
            if not LEAST_FRAME <= value <= LARGEST_FRAME:
                raise FrameError(ErrorCode.PROTOCOL_ERROR, "A frame can't be of the size announced.")
            self.sending.largest_frame = value
        elif key == frames.HEADER_TABLE_SIZE:
            self._encoder.header_table_size = min(value, 4096)

    def grow(self, credit: int, streams: Iterable[Stream]) -> None:
        """The connection's window has grown; `streams` share it. Raises FrameError."""
        self.sending.window += credit
        if self.sending.window > LARGEST_WINDOW:
            raise FrameError(ErrorCode.FLOW_CONTROL_ERROR, "A window is too large.")
        self.pump_all(streams)

    def grow_stream(self, credit: int, stream: Stream) -> None:
        """A stream's window has grown. Raises FrameError."""
        stream.windows.send += credit
        if stream.windows.send > LARGEST_WINDOW:
            raise FrameError(ErrorCode.FLOW_CONTROL_ERROR, "A window is too large.")
        self.pump(stream)

    def pump_all(self, streams: Iterable[Stream]) -> None:
        """Sends what the windows let through of what waits on any stream."""
        for stream in list(streams):
            if stream.outgoing:
                self.pump(stream)

    def pump(self, stream: Stream) -> None:
        """Sends what the windows let through of what waits on a stream."""
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
            self.transport.writelines((header(length, frames.DATA, flags, stream.number), *pieces))
        self.advance()

    def give_up(self, stream: Stream) -> None:
        """Nothing more is sent on a stream: the other side takes no more of it."""
        stream.outgoing.clear()
        self.advance()

    # Who waits until something has left.

    async def progress(self) -> None:
        """Returns when something more could be sent, or the connection is over."""
        if self.over:
            return
        if self._progress is None:
            self._progress = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._progress)

    def advance(self) -> None:
        """Wakes those who wait for progress."""
        if self._progress is not None:
            self._progress.set_result(None)
            self._progress = None

    def resume(self) -> None:
        """The transport has little left."""
        self.paused = False
        self._unsent_replies = 0
        self.advance()

    def end(self) -> None:
        """The connection is over."""
        self.over = True
        self.paused = False
        self.advance()
