"""A connection's socket on an event loop, with TLS or without: the native library reads and writes it (cpp/socket.h).

Used as asyncio's transports are. Those of the loops pass each message through several layers of Python and of copies,
which for a small message takes longer than the network.
"""

import asyncio
import ctypes
import itertools
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from time import perf_counter_ns
from typing import Any, Protocol

from ..native import address, library
from .messages import Buffer
from .tls import Context, OtherSide, other_side
from .windows import Sending

END, WOULD_BLOCK, BROKEN, WANTS_READ, WANTS_WRITE = 0, -1, -2, -3, -4  # cpp/socket.h has them
WAITS = 1 << 62  # the same; added to bytes that were taken: some of them wait in the native library
MUCH_UNSENT, LITTLE_UNSENT = 64 << 10, 16 << 10  # bytes: beyond the first who sends is to wait, until the second
SMALL_BYTES = 4 << 10  # copied sooner than written by itself
LINGER_SECONDS = 10.0  # for what was sent before the end
MUCH_READ = 64 << 10  # bytes: OpenSSL may have more, of which the system does not know
READ_AT_ONCE = 4 << 20  # bytes: then other connections have their turn
# A link brings a large message in pieces of a packet or some, and each would wake the loop. Once it is known how fast
# they come, it is woken for what comes within so many seconds, at most so many bytes.
WAKE_SECONDS, WAKE_BYTES, LEAST_WAKE_BYTES = 0.5e-3, 64 << 10, 8 << 10
RECORD_BYTES = 17 << 10  # of TLS, the largest: so much may have left the system's hands already


class HandshakeError(OSError):
    """The two sides could not agree; its text says why."""


class CertificateError(HandshakeError):
    """The other side's certificate is not the one that it must show."""


class Told(Protocol):
    """Who uses a transport: as asyncio.BufferedProtocol, and more."""

    sending: Sending
    read_at: int  # nanoseconds, `perf_counter_ns`: when the reading of the latest bytes began

    def connection_made(self, transport: "Transport") -> None:
        """Bytes can be sent, and may come."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing can be sent any more and nothing comes."""

    def serve(self) -> int | None:
        """Reads by itself what may be a stream's whole messages: how many bytes; None when it does not."""

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes belong."""

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes came there."""

    @property
    def missing(self) -> int:
        """Bytes of the frame that has begun that are to come: the other side waits for nothing to send them."""

    def pause_writing(self) -> None:
        """Much waits to leave."""

    def resume_writing(self) -> None:
        """Little does."""


class Transport:
    """Use it on the event loop that it was made on."""

    def __init__(self, end: socket.socket, context: Context | None = None, name: str | None = None) -> None:
        """Takes over `end`, which is connected and does not block; with a `context` it speaks TLS.

        `name` that the other side's certificate must be for, of who calls; None: this side answers. Raises OSError.
        """
        native = library()
        self._loop = asyncio.get_running_loop()
        self._descriptor = end.fileno()
        self._context = context  # outlives the native side
        self.socket = end
        self.handle: int | None = native.moehive_socket(
            self._descriptor, None if context is None else context.handle, None if name is None else name.encode()
        )
        if not self.handle:
            end.close()
            raise OSError("There is no memory left for a connection.")
        self._native_shake_hands = native.moehive_socket_shake_hands
        self._native_read = native.moehive_socket_read
        self._native_write = native.moehive_socket_write
        self._told: Told
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._waiting = False  # for the socket to take more
        self._paused = False
        self._closing = False
        self._linger: asyncio.TimerHandle | None = None
        self._wakes_at = 1  # bytes that wake the loop
        self._read_until = 0  # nanoseconds: when a piece of a large message was read that was not the last
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __del__(self) -> None:
        self._free()

    async def shake_hands(self) -> None:
        """TLS's handshake, and nothing without. Raises HandshakeError; whoever calls bounds the time and closes."""
        assert self.handle is not None
        while (state := self._native_shake_hands(self.handle)) != 0:
            if state == BROKEN:
                raise self._disagreement(self._why())
            ready = self._loop.create_future()
            add, remove = (
                (self._loop.add_writer, self._loop.remove_writer)
                if state == WANTS_WRITE
                else (self._loop.add_reader, self._loop.remove_reader)
            )
            add(self._descriptor, _wake, ready)
            try:
                await ready
            finally:
                remove(self._descriptor)

    def other_side(self) -> OtherSide:
        """Whom the connection leads to, after the handshake."""
        assert self.handle is not None
        return other_side(self.socket, self.handle)

    def speaks_http2(self) -> bool:
        """Whether both sides agreed on it in the handshake; True without TLS."""
        return bool(library().moehive_socket_speaks_http2(self.handle))

    def start(self, told: Told) -> None:
        """From now on bytes come and go."""
        self._told = told
        told.sending.socket = self.handle
        told.connection_made(self)
        if not self._closing:
            self._loop.add_reader(self._descriptor, self.read)
            self._loop.call_soon(self.read)  # TLS may have read something with the handshake

    def write(self, data: Buffer) -> None:
        """Sends bytes, which must stay as they are until they have left."""
        self._write(data, more=False)

    def writelines(self, pieces: Sequence[Buffer]) -> None:
        """As `write`, one after the other; small ones beside each other go as one."""
        together = [
            part
            for small, group in itertools.groupby(pieces, _is_small)
            for part in ((b"".join(group),) if small else group)
        ]
        last = len(together) - 1
        for number, piece in enumerate(together):
            self._write(piece, more=number != last)

    def later(self, data: Buffer) -> None:
        """Sends bytes that follow those that wait, or when the socket takes more."""
        if self._closing:
            return
        self._wait()
        if len(data):
            self._unsent.append(memoryview(data))
            self._unsent_bytes += len(data)
        if self._unsent_bytes > MUCH_UNSENT and not self._paused:
            self._paused = True
            self._told.pause_writing()

    def _wait(self) -> None:
        """Something is to leave when the socket takes more."""
        if not self._waiting:
            self._waiting = True
            self._told.sending.waiting = 1
            self._loop.add_writer(self._descriptor, self._writable)

    def broke(self) -> None:
        """The native library says that the connection is broken, now or before."""
        if self.handle is not None:
            self._end(ConnectionError(self._why()))

    def close(self) -> None:
        """Ends it, once what was sent has left, within LINGER_SECONDS."""
        if self._closing:
            return
        self._closing = True
        self._loop.remove_reader(self._descriptor)
        if self._waiting:
            self._linger = self._loop.call_later(LINGER_SECONDS, self.abort)
        else:
            self._end(None)

    def abort(self) -> None:
        """Ends it at once."""
        self._end(None)

    def _write(self, data: Buffer, more: bool) -> None:
        if self._closing or not len(data):
            return
        if self._waiting:
            self.later(data)
            return
        taken = self._native_write(self.handle, data if type(data) is bytes else address(data), len(data), more)
        if taken == len(data):
            return
        if taken == BROKEN:
            self.broke()
        else:
            self.later(memoryview(data)[bytes_of(taken) :])

    def _writable(self) -> None:
        taken = self._native_write(self.handle, None, 0, False)
        while taken == 0 and self._unsent:
            piece = self._unsent.popleft()
            taken = self._native_write(self.handle, address(piece), len(piece), bool(self._unsent))
            if taken == BROKEN:
                break
            rest = piece[bytes_of(taken) :]
            self._unsent_bytes -= len(piece) - len(rest)
            if len(rest):
                self._unsent.appendleft(rest)
            elif taken == len(piece):
                taken = 0
        if taken == BROKEN:
            self.broke()
            return
        if taken == 0:
            self._waiting = False
            self._told.sending.waiting = 0
            self._loop.remove_writer(self._descriptor)
            if self._closing:
                self._end(None)
                return
        if self._paused and self._unsent_bytes <= LITTLE_UNSENT:
            self._paused = False
            self._told.resume_writing()

    def read(self) -> None:
        """Reads what has come; the event loop calls it when something has."""
        total = 0
        if self._wakes_at != 1:
            self._wake_at(1)
        while not self._closing:
            got = self._told.serve()
            if got is None:
                room = self._told.get_buffer(-1)
                self._told.read_at = perf_counter_ns()
                got = self._native_read(self.handle, ctypes.addressof(ctypes.c_char.from_buffer(room)), len(room))
                if got > 0:
                    self._told.buffer_updated(got)
                    total += got
                    if got < len(room):
                        self._wait_for_more(total)
                        return
                    if total > READ_AT_ONCE:
                        self._loop.call_soon(self.read)
                        return
                    continue
            elif got >= MUCH_READ:
                continue
            if got == BROKEN:
                self.broke()
            elif got == END:
                self._end(None)
            return

    def _wait_for_more(self, got: int) -> None:
        """So many bytes came at last."""
        now = perf_counter_ns()
        soon = int(got * WAKE_SECONDS * 1e9 / max(1, now - self._read_until))
        self._read_until = now
        if (wanted := min(soon, WAKE_BYTES, self._told.missing - RECORD_BYTES)) >= LEAST_WAKE_BYTES:
            self._wake_at(wanted)

    def _wake_at(self, size: int) -> None:
        """The loop is told of what has come once it is so many bytes, or the end; not of a socket that is closed."""
        if self._closing:
            return
        self._wakes_at = size
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def _end(self, error: Exception | None) -> None:
        """No bytes come or go any more."""
        self._closing = True
        if self.handle is None:
            return
        if self._linger is not None:
            self._linger.cancel()
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        if error is None:
            library().moehive_socket_say_end(self.handle)
        self._unsent.clear()
        self._free()
        self.socket.close()
        if hasattr(self, "_told"):
            self._loop.call_soon(self._told.connection_lost, error)

    def _free(self) -> None:
        handle, self.handle = self.handle, None
        if handle:
            if hasattr(self, "_told"):
                self._told.sending.socket = None
            library().moehive_socket_end(handle)

    @staticmethod
    def _disagreement(why: str) -> HandshakeError:
        reason = why.removeprefix("certificate: ")  # as cpp/socket.cc says it
        return HandshakeError(why) if reason == why else CertificateError(reason)

    def _why(self) -> str:
        return bytes(library().moehive_socket_error(self.handle)).decode("ascii", "replace") or "it ended"


async def connect(addresses: Iterable[tuple[socket.AddressFamily, Any]]) -> socket.socket:
    """A connection to the first of `addresses` that takes one. Raises OSError."""
    loop = asyncio.get_running_loop()
    failure = OSError("It has no address.")
    for family, where in addresses:
        end = socket.socket(family, socket.SOCK_STREAM)
        try:
            end.setblocking(False)
            await loop.sock_connect(end, where)
        except OSError as error:
            end.close()
            failure = error
        except BaseException:
            end.close()
            raise
        else:
            return end
    raise failure


def bytes_of(taken: int) -> int:
    """How many bytes the native library took, by what it returned."""
    return 0 if taken < 0 else taken & ~WAITS


def _is_small(piece: Buffer) -> bool:
    return len(piece) <= SMALL_BYTES


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
