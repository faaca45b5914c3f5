"""The end that answers, used as a grpc.aio server is.

Generated code registers a service here (`add_…Servicer_to_server`); what a service is given as its context has the
methods of grpc.aio's that the cluster's services need.
"""

import asyncio
import inspect
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from time import perf_counter_ns
from typing import Any, NamedTuple

import grpc
import grpc.aio

from ..channel import MAX_MESSAGE_BYTES
from ..interceptor import CallGuard
from . import status
from .connection import Connection
from .frames import ErrorCode
from .messages import Buffer
from .stream import Stream
from .tls import Context as TlsContext
from .tls import OtherSide
from .transport import Transport
from .windows import Taker, Times

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096  # a cluster has 1,024 nodes, which fetch experts on a connection of their own
MAX_CALLS = 128  # of one connection
HANDSHAKE_SECONDS = 10.0  # for TLS's
BACKLOG = 128  # connections that wait to be taken
REST_SECONDS = 1.0  # when no more files can be opened

AtOnce = Callable[[Buffer], Sequence[Buffer] | None]


class _Details(NamedTuple):
    """grpc.HandlerCallDetails, for the interceptor."""

    method: str
    invocation_metadata: tuple[tuple[str, str], ...]


class Context:
    """What a service sees of a call: the part of grpc.aio.ServicerContext that services use, and more."""

    def __init__(self, stream: Stream, caller: OtherSide, parse: Any, serialize: Any) -> None:
        self.code: grpc.StatusCode = grpc.StatusCode.OK
        self.details = ""
        self.caller = caller
        self._stream = stream
        self._parse = parse
        self._serialize = serialize

    def auth_context(self) -> dict[str, list[bytes]]:
        """As grpc.aio's: the DNS names in the caller's certificate."""
        return {"x509_subject_alternative_name": [name.encode() for name in self.caller.names]}

    async def read(self) -> Any:
        """The next request, or grpc.aio.EOF. Raises DecodeError, and AioRpcError when the caller is gone."""
        message = await self.read_message()
        return grpc.aio.EOF if message is None else self._parse(message)

    async def write(self, reply: Any) -> None:
        """Sends a reply, and waits while the caller, or the network, takes no more.

        A reply that is serialized already is bytes, or a tuple of buffers, which must not change until they left.
        """
        message = self._serialize(reply)
        self._stream.send(message if isinstance(message, tuple) else (message,))
        await self._stream.drain()
        self._stream.times.sent_at = perf_counter_ns()

    async def read_message(self) -> Buffer | None:
        """The next request's bytes, which nobody else has; None after the last. Raises as `read`."""
        return await self._stream.read()

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        """Ends the call with a status. Raises grpc.aio.AbortError always."""
        self.code, self.details = code, details
        raise grpc.aio.AbortError("The call was ended.")

    def answer_at_once(self, take: AtOnce) -> None:
        """From now on `take` gets each request's bytes as they come, before `read` does, if no other waits there.

        It returns the reply, in pieces, or None to leave the request to `read`. It must not wait for anything.
        """
        stream = self._stream

        def take_message(message: Buffer) -> bool:
            reply = take(message)
            if reply is None:
                return False
            stream.send(reply)
            stream.times.sent_at = perf_counter_ns()
            return True

        stream.on_message = take_message

    @property
    def times(self) -> Times:
        """Of the message that was read last, or that is answered at once, and of the reply before."""
        return self._stream.times

    def take_natively(self, taker: Taker) -> None:
        """See Stream.take_natively."""
        self._stream.take_natively(taker)


class Server:
    """Listens on one port. Use it on one event loop."""

    def __init__(self, guard: CallGuard, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        """`max_bytes` of a message that comes."""
        self._guard = guard
        self._max_bytes = max_bytes
        self._handlers: dict[str, Any] = {}
        self._listening: list[socket.socket] = []
        self._context: Callable[[], TlsContext] | None = None
        self._welcoming: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()
        self._calls: dict[asyncio.Task[None], Connection] = {}
        self._ending = False

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """For generated code."""
        for name, handler in handlers.items():
            self._handlers[f"/{service}/{name}"] = handler

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """For generated code, which names the same methods once more."""

    async def listen(self, host: str, port: int, context: Callable[[], TlsContext] | None) -> int:
        """Listens on host:port (0: any free one) and returns the port; without `context` on a machine's loopback.

        Raises OSError with one sentence when the port is taken or the address is not this machine's.
        """
        loop = asyncio.get_running_loop()
        self._context = context
        try:
            self._listening = await _listen(host, port)
        except OSError as error:
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            raise OSError(
                f"Cannot listen on {where}: the port is in use or the address is not this machine's. "
                "Stop the other program or choose another port."
            ) from error
        for listener in self._listening:
            loop.add_reader(listener.fileno(), self._accept, listener)
        bound: int = self._listening[0].getsockname()[1]
        return bound

    async def stop(self, grace: float | None) -> None:
        """Takes no calls any more; those that go on have `grace` seconds (None: none) to end."""
        self._ending = True
        loop = asyncio.get_running_loop()
        for listener in self._listening:
            loop.remove_reader(listener.fileno())
            listener.close()
        self._listening = []
        for task in self._welcoming:
            task.cancel()
        for connection in self._connections:
            connection.say_goodbye()
        if self._calls and grace:
            await asyncio.wait(self._calls, timeout=grace)
        for task in list(self._calls):
            task.cancel()
        if self._calls:
            await asyncio.wait(self._calls)
        for connection in list(self._connections):
            connection.close("The server has ended.")

    def _accept(self, listener: socket.socket) -> None:
        """Somebody knocks."""
        loop = asyncio.get_running_loop()
        for _ in range(BACKLOG):
            try:
                end, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # too many files are open
                log.warning("No connection can be taken for %.0f s: %s", REST_SECONDS, error.strerror or error)
                loop.remove_reader(listener.fileno())
                loop.call_later(REST_SECONDS, self._listen_again, listener)
                return
            if len(self._welcoming) + len(self._connections) >= MAX_CONNECTIONS:
                end.close()
                continue
            end.setblocking(False)
            task = loop.create_task(self._welcome(end))
            self._welcoming.add(task)
            task.add_done_callback(self._welcoming.discard)

    def _listen_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    async def _welcome(self, end: socket.socket) -> None:
        transport: Transport | None = None
        try:
            transport = Transport(end, None if self._context is None else self._context())
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await transport.shake_hands()
            transport.start(Connection(self._max_bytes, owner=self))
        except (OSError, TimeoutError) as error:
            log.debug("A handshake failed: %s", error)
            _give_up(end, transport)
        except asyncio.CancelledError:
            _give_up(end, transport)
            raise

    def made(self, connection: Connection) -> None:
        """See Owner."""
        if self._ending or len(self._connections) >= MAX_CONNECTIONS:
            connection.close("The server takes no more connections.")
        else:
            self._connections.add(connection)

    def called(self, connection: Connection, stream: Stream) -> None:
        """See Owner."""
        calls = sum(1 for owner in self._calls.values() if owner is connection)
        if self._ending or calls >= MAX_CALLS:
            connection.drop(stream, ErrorCode.REFUSED_STREAM)
            return
        task = asyncio.get_running_loop().create_task(self._answer(connection, stream))
        self._calls[task] = connection
        task.add_done_callback(lambda done: self._calls.pop(done, None))
        stream.on_end = lambda: None if stream.failure is None else _cancel(task)

    def gone(self, connection: Connection) -> None:
        """See Owner."""
        self._connections.discard(connection)

    async def _answer(self, connection: Connection, stream: Stream) -> None:
        code, details = grpc.StatusCode.OK, ""
        try:
            code, details = await self._call(connection, stream)
        except asyncio.CancelledError:  # the caller is gone, or this server ends
            code, details = grpc.StatusCode.UNAVAILABLE, "The server is ending."
        except grpc.aio.AioRpcError:
            return  # the caller is gone
        except Exception:  # what the guard does not know
            log.exception("A call failed")
            code, details = grpc.StatusCode.INTERNAL, "The call failed."
        stream.end(status.trailers(code, details))

    async def _call(self, connection: Connection, stream: Stream) -> tuple[grpc.StatusCode, str]:
        fields = dict(stream.fields)
        path = fields.get(":path", "")

        async def find(details: Any) -> Any:
            return self._handlers.get(details.method)

        metadata = tuple((key, value) for key, value in stream.fields if not key.startswith(":"))
        details: Any = _Details(path, metadata)
        if fields.get(":method") != "POST" or not fields.get("content-type", "").startswith("application/grpc"):
            return grpc.StatusCode.UNKNOWN, "This port speaks gRPC only."
        handler = await self._guard.intercept_service(find, details)
        if handler is None:
            return grpc.StatusCode.UNIMPLEMENTED, f"There is no method {path[:256]}."
        context = Context(stream, connection.other_side, handler.request_deserializer, handler.response_serializer)
        connection.answer(stream)
        behavior = handler.stream_stream or handler.unary_stream or handler.unary_unary
        try:
            first: Any = None
            if handler.request_streaming:
                first = _requests(context)
            elif (first := await context.read()) is grpc.aio.EOF:
                return grpc.StatusCode.INTERNAL, "The call came without its request."
            if inspect.isasyncgenfunction(behavior):
                async for reply in behavior(first, context):
                    await context.write(reply)
            elif handler.response_streaming:
                await behavior(first, context)
            else:
                await context.write(await behavior(first, context))
        except grpc.aio.AbortError:
            return context.code, context.details
        return grpc.StatusCode.OK, ""


async def _listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen; all of a machine's addresses are those of IPv4 and of IPv6. Raises OSError."""
    if host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6():
        listening = [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)]
    else:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listening = []
        try:
            for family, _, _, _, address in dict.fromkeys(found):
                where = (address[0], port or (listening[0].getsockname()[1] if listening else 0))
                listening.append(socket.create_server(where, family=family, backlog=BACKLOG))
        except OSError:
            for listener in listening:
                listener.close()
            raise
    for listener in listening:
        listener.setblocking(False)
    return listening


def _give_up(end: socket.socket, transport: Transport | None) -> None:
    if transport is None:
        end.close()
    else:
        transport.abort()


async def _requests(context: Context) -> AsyncIterator[Any]:
    while (request := await context.read()) is not grpc.aio.EOF:
        yield request


def _cancel(task: "asyncio.Task[None]") -> None:
    if task is not asyncio.current_task():
        task.cancel()
