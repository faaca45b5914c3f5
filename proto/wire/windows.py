"""What a connection and its busiest stream may send and receive, as native code has it, too (cpp/messages.cc)."""

import ctypes
from typing import NamedTuple, Protocol

HEAD_BYTES = 14  # of a frame that is one message: HTTP/2's header and gRPC's prefix


class Sending(ctypes.Structure):
    """Of a connection. Sending of cpp/messages.cc, field for field."""

    _fields_ = (
        ("socket", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("window", "largest_frame", "waiting")),
    )

    socket: int | None  # of cpp/socket.h; None: it is closed
    window: int  # bytes that the other side takes, of all streams
    largest_frame: int  # that it takes
    waiting: int  # whether earlier bytes still wait to leave


class Windows(ctypes.Structure):
    """Of a stream. Windows of cpp/messages.cc, field for field."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("number", "send", "receive", "largest"))

    number: int  # the stream's
    send: int  # bytes that the other side takes
    receive: int  # bytes that it may still send
    largest: int  # bytes of a message that is taken


class Times(ctypes.Structure):
    """When a stream's latest message came and its latest reply went. Times of cpp/inlet.h, field for field.

    Nanoseconds of this process's monotonic clock, as `perf_counter_ns`; 0: not yet.
    """

    _fields_ = tuple((name, ctypes.c_int64) for name in ("read_at", "came_at", "ready_at", "sent_at"))

    read_at: int  # the reading of its bytes began
    came_at: int  # it was there
    ready_at: int  # the latest reply's content was there; who answers says so
    sent_at: int  # a reply's bytes had left


class Served(ctypes.Structure):
    """What one reading found, or several. Served of cpp/inlet.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("filled", "consumed", "taken", "messages", "unsent")),
        ("unsent_at", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kept", "refused")),
    )

    filled: int  # bytes in the buffer
    consumed: int  # those of them that are done with
    taken: int  # bytes of data of the messages that were taken
    messages: int  # that were taken
    unsent: int  # bytes of the last reply that were not taken
    unsent_at: int
    kept: int  # whether the buffer begins with a message that is not whole yet
    refused: int  # whether that is the whole reply, without its head, because the windows do not let it through


class Inlet(ctypes.Structure):
    """How native code reads a stream's messages. Inlet of cpp/inlet.h, field for field."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("serve", "sending", "windows", "times", "take", "taker", "buffer", "served")
        ),
        *((name, ctypes.c_int64) for name in ("room", "descriptor", "taken", "got", "usual")),
    )

    served: int  # the address of a Served
    descriptor: int  # of the socket
    taken: int  # bytes of data of messages that it took, and that nobody has counted
    got: int  # what the latest reading returned, when it is left to the connection; see moehive_serve
    usual: int  # whether it may read now


class Outlet(NamedTuple):
    """How native code sends a stream's messages: function(sending, windows, message, size), see moehive_send."""

    function: int
    sending: int
    windows: int


class Taker(Protocol):
    """Takes messages of one stream natively, between the bytes that came and the bytes that go."""

    @property
    def function(self) -> int:
        """The address of a Take of cpp/messages.cc."""

    @property
    def context(self) -> int:
        """What it is called with."""

    def ready(self) -> bool:
        """Whether it takes messages now, and until the event loop's next turn. Asked before each reading."""

    @property
    def patience(self) -> tuple[int | None, int]:
        """With what the next message is waited for once one was taken, without a turn of the event loop.

        The address of a NativeEyes (proto/lookout.py), and for how many nanoseconds it looks before it sleeps; None:
        it is not waited for.
        """

    def took(self, messages: int) -> None:
        """So many were taken, perhaps none."""
