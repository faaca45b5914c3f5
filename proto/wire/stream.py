"""One call's stream on a connection: messages both ways, each direction held back by its window (RFC 9113, 5.2)."""

import asyncio
import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Protocol

import grpc
import grpc.aio

from . import status
from .frames import ErrorCode, FrameError
from .messages import PREFIX_BYTES, Assembler, Buffer
from .windows import Inlet, Outlet, Taker, Times, Windows


class StreamSender(Protocol):
    """What a stream needs of its connection's sender."""

    first_window: int  # of a new stream
    paused: bool  # the transport has more than it wants

    def send(self, stream: "Stream", message: Sequence[Buffer]) -> None:
        """See Stream.send."""

    def outlet(self, stream: "Stream") -> Outlet:
        """See Stream.outlet."""
        ...

    def sent_natively(self, stream: "Stream", where: int, size: int, taken: int) -> None:
        """See Stream.sent_natively."""

    async def progress(self) -> None:
        """Returns when something more could be sent, or the connection is over."""


class StreamServing(Protocol):
    """What a stream needs of who takes messages natively on its connection."""

    def take(self, stream: "Stream", taker: Taker) -> None:
        """See Stream.take_natively."""

    def settle(self) -> None:
        """See Stream.settle."""

    def go_on(self) -> None:
        """See Stream.go_on."""


class StreamConnection(Protocol):
    """What a stream needs of its connection."""

    max_bytes: int  # of a message
    window_bytes: int  # that a stream may bring before they are read
    read_at: int  # nanoseconds, `perf_counter_ns`: when the reading of the latest bytes began

    @property
    def sender(self) -> StreamSender:
        """Sends what the streams send."""
        ...

    @property
    def serving(self) -> StreamServing:
        """Takes messages natively."""
        ...

    def inlet(self) -> Inlet:
        """See Stream.inlet."""
        ...

    def end(self, stream: "Stream", trailers: Sequence[tuple[str, str]] | None) -> None:
        """See Stream.end."""

    def drop(self, stream: "Stream", code: ErrorCode) -> None:
        """Ends a stream at once."""

    def credit(self, stream: "Stream", length: int) -> None:
        """So many bytes of a stream were read."""


class Stream:
    """What a caller and who answers it have in common. Use it on the connection's event loop."""

    def __init__(self, connection: StreamConnection, number: int) -> None:
        self.number = number
        self.windows = Windows(number, connection.sender.first_window, connection.window_bytes, connection.max_bytes)
        self.windows_at = ctypes.addressof(self.windows)
        self.times = Times()
        self.times_at = ctypes.addressof(self.times)
        self.outgoing: deque[memoryview] = deque()  # what the windows do not let through yet
        self.on_message: Callable[[Buffer], bool] | None = None
        """Called with each message as it comes, when none waits to be read; says whether it took it."""
        self.on_end: Callable[[], None] | None = None
        self.failure: Exception | None = None  # how the other side, or the network, has ended it
        self.fields: list[tuple[str, str]] = []  # the headers that began it here
        self.answered = False  # headers were sent
        self._connection = connection
        self._sender = connection.sender
        self._assembler = Assembler(connection.max_bytes)
        # Messages that were read are credited to the sender in lots of so many bytes: each wakes it once more.
        self._credit = connection.window_bytes // 8
        self._owed = 0  # bytes of messages that were taken since the last credit
        self._began = 0  # when the reading of the message that is coming began
        self._messages: deque[tuple[Buffer, int, int]] = deque()  # with when their reading began and ended
        self._reader: asyncio.Future[None] | None = None
        self.half_closed = False  # the other side sends no more
        self.closed = False  # this side does not

    @property
    def ended(self) -> bool:
        """Whether nothing will come any more but what waits to be read."""
        return self.half_closed or self.failure is not None

    async def read(self) -> Buffer | None:
        """The next message; None after the last. Raises AioRpcError when the call has failed."""
        while not self._messages:
            if self.failure is not None:
                raise self.failure
            if self.half_closed:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        message, self.times.read_at, self.times.came_at = self._messages.popleft()
        self.owe(len(message) + PREFIX_BYTES)
        return message

    def send(self, message: Sequence[Buffer]) -> None:
        """Sends a message in pieces, each a buffer of bytes that must not change until they have left.

        What does not leave at once waits here; whoever sends much awaits `drain`. Does nothing on a stream that has
        ended.
        """
        if not self.closed and self.failure is None:
            self._sender.send(self, message)

    def outlet(self) -> Outlet:
        """How native code sends messages on this stream, for as long as it has not ended."""
        return self._sender.outlet(self)

    def sent_natively(self, where: int, size: int, taken: int) -> None:
        """Sends what is left of a message of `size` bytes at an address, of which an outlet has said `taken`."""
        if not self.closed and self.failure is None:
            self._sender.sent_natively(self, where, size, taken)

    def take_natively(self, taker: Taker) -> None:
        """From now on `taker` gets each whole message before `on_message` does; of one stream of a connection."""
        self._connection.serving.take(self, taker)

    def inlet(self) -> Inlet:
        """How native code reads the messages that a taker takes, on the event loop's thread, while it is `usual`.

        It lasts as long as this stream. Who has read by it calls `settle` now and then, and `go_on` after a reading
        that it has left to the connection.
        """
        return self._connection.inlet()

    def settle(self) -> None:
        """Credits what an inlet has read."""
        self._connection.serving.settle()

    def go_on(self) -> None:
        """Takes what an inlet has read and left to the connection."""
        self._connection.serving.go_on()

    async def drain(self) -> None:
        """Returns once what was sent has left, or nearly. Raises AioRpcError when the call has failed."""
        while self.failure is None and (self.outgoing or self._sender.paused):
            await self._sender.progress()
        if self.failure is not None:
            raise self.failure

    def end(self, trailers: Sequence[tuple[str, str]] | None = None) -> None:
        """Sends nothing any more: `trailers`, of who answers, or that no message will follow."""
        if self.closed or self.failure is not None:
            return
        self.closed = True
        self._connection.end(self, trailers)

    def cancel(self) -> None:
        """Wants nothing of this call any more."""
        if self.failure is None:
            self.fail(status.error(grpc.StatusCode.CANCELLED, "The call was given up."))
            self._connection.drop(self, ErrorCode.CANCEL)

    # What follows is the connection's.

    @property
    def between(self) -> bool:
        """Whether the next byte begins a message, and none waits to be read."""
        return self._assembler.between and not self._messages and not self.ended

    @property
    def room(self) -> memoryview | None:
        """Where a large message's next bytes may be put, to be told of by `filled`."""
        return self._assembler.room() if self._assembler.missing and self.failure is None else None

    def count(self, length: int) -> None:
        """`length` bytes of this stream came, padding included. Raises FrameError."""
        self.windows.receive -= length
        if self.windows.receive < 0:
            raise FrameError(ErrorCode.FLOW_CONTROL_ERROR, "A stream brought more than its window.")

    def filled(self, length: int) -> None:
        """`length` bytes were put into `room`."""
        message = self._assembler.filled(length)
        if message is not None:
            self._deliver(message)

    def take_whole(self, data: memoryview) -> bool:
        """Takes a message that came as one DATA frame; says whether that was what could come here now."""
        length = len(data)
        if not self._assembler.between or self.ended or length > self._assembler.max_bytes:
            return False
        if length + PREFIX_BYTES > self.windows.receive:
            return False
        self.windows.receive -= length + PREFIX_BYTES
        self._began = self._connection.read_at
        self._deliver(bytes(data))
        return True

    def feed(self, data: memoryview) -> None:
        """Bytes came. Raises AioRpcError for messages that are refused."""
        if self._assembler.between:
            self._began = self._connection.read_at
        for message in self._assembler.feed(data):
            self._deliver(message)
            self._began = self._connection.read_at  # of the next one's

    def half_close(self) -> None:
        """The other side has sent its last message."""
        if not self._assembler.between:
            self.fail(status.error(grpc.StatusCode.INTERNAL, "The other side ended in the middle of a message."))
        self.half_closed = True
        self._over()

    def fail(self, error: Exception) -> None:
        """The call is over, whatever waited to be sent."""
        if self.failure is None:
            self.failure = error
            self.outgoing.clear()
            self._over()

    def _over(self) -> None:
        self._wake()
        if self.on_end is not None:
            self.on_end()

    def _deliver(self, message: Buffer) -> None:
        came_at = perf_counter_ns()
        if self.on_message is not None and not self._messages:
            self.times.read_at, self.times.came_at = self._began, came_at
            if self.on_message(message):
                self.owe(len(message) + PREFIX_BYTES)
                return
        self._messages.append((message, self._began, came_at))
        self._wake()

    def owe(self, length: int) -> None:
        """So many bytes of data were read, and are to be credited to the other side."""
        self._owed += length
        if self._owed >= self._credit and not self.half_closed:
            self.windows.receive += self._owed
            owed, self._owed = self._owed, 0
            self._connection.credit(self, owed)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
