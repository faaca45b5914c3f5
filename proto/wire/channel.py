"""The end that calls: a channel to one server, which connects when it is needed, once."""

import asyncio
import socket
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ..bounds import host_port
from ..channel import MAX_MESSAGE_BYTES, Identity
from . import status
from .connection import Connection
from .stream import Stream
from .tls import client_context
from .transport import CertificateError, HandshakeError, Transport, connect

CONNECT_SECONDS = 15.0  # with TLS's handshake


class Channel:
    """Use it on one event loop. A connection that has ended is not opened again: make another channel."""

    def __init__(
        self,
        address: str,
        identity: Identity | None,
        server_name: str,
        max_bytes: int = MAX_MESSAGE_BYTES,
        window_bytes: int | None = None,
    ) -> None:
        """To `address` (host:port), whose certificate must be for `server_name`; no `identity`: without TLS.

        `max_bytes` of a message that comes, `window_bytes` of those that nobody has read yet; None: some more.
        """
        self._address = address
        self._identity = identity
        self._server_name = server_name
        self._max_bytes = max_bytes
        self._window_bytes = window_bytes
        self._opening: asyncio.Task[Connection] | None = None
        self._closed = False

    async def connect(self) -> Connection:
        """Returns once the other side speaks gRPC. Raises AioRpcError (UNAVAILABLE)."""
        if self._closed:
            raise status.error(grpc.StatusCode.UNAVAILABLE, "The channel is closed.")
        if self._opening is None:
            self._opening = asyncio.create_task(self._connect())
        return await asyncio.shield(self._opening)

    async def open(self, method: str, metadata: tuple[tuple[str, str], ...]) -> Stream:
        """Begins a call of `method`, /package.Service/Method. Raises AioRpcError."""
        connection = await self.connect()
        return connection.open(
            [
                (":method", "POST"),
                (":scheme", "http" if self._identity is None else "https"),
                (":path", method),
                (":authority", self._server_name),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("user-agent", "moehive"),
                *metadata,
            ]
        )

    def unary_stream(self, method: str, request_serializer: Any, response_deserializer: Any = None, **_: Any) -> Any:
        """As grpc.aio's: what a stub calls, or who reads the answers' bytes itself."""

        def call(request: Any, metadata: tuple[tuple[str, str], ...] = ()) -> Call:
            parse = response_deserializer or (lambda message: message)
            return Call(self, method, request_serializer(request), parse, metadata)

        return call

    def unary_unary(self, method: str, request_serializer: Any, response_deserializer: Any) -> Any:
        """As grpc.aio's."""

        async def ask(request: Any, metadata: tuple[tuple[str, str], ...], timeout: float) -> Any:  # noqa: ASYNC109
            call = Call(self, method, request_serializer(request), response_deserializer, metadata)
            try:
                async with asyncio.timeout(timeout):
                    reply = await call.read()
                    if reply is not grpc.aio.EOF and await call.read() is grpc.aio.EOF:
                        return reply
            except TimeoutError as error:
                late = f"{method} was not answered within {timeout:.0f} s."
                raise status.error(grpc.StatusCode.DEADLINE_EXCEEDED, late) from error
            except DecodeError as error:
                raise status.error(grpc.StatusCode.INTERNAL, f"The answer to {method} can't be read.") from error
            finally:
                call.cancel()
            raise status.error(grpc.StatusCode.INTERNAL, f"The answer to {method} is not one message.")

        return ask

    @property
    def over(self) -> bool:
        """Whether no call can begin on it any more."""
        if self._opening is None or not self._opening.done():
            return self._closed
        if self._opening.cancelled() or self._opening.exception() is not None:
            return True
        connection = self._opening.result()
        return self._closed or connection.lost is not None or connection.going

    async def close(self) -> None:
        """Ends every call on it."""
        self._closed = True
        if self._opening is None:
            return
        self._opening.cancel()
        await asyncio.wait([self._opening])
        if not self._opening.cancelled() and self._opening.exception() is None:
            self._opening.result().close("The channel was closed.")

    async def _connect(self) -> Connection:
        transport: Transport | None = None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                context = None if self._identity is None else client_context(self._identity)
                host, port = host_port(self._address)
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
                end = await connect([(family, address) for family, _, _, _, address in found])
                transport = Transport(end, context, self._server_name)
                await transport.shake_hands()
        except TimeoutError as error:
            if transport is not None:
                transport.abort()
            raise self._unreachable(f"it did not answer within {CONNECT_SECONDS:.0f} s.") from error
        except HandshakeError as error:
            assert transport is not None
            transport.abort()
            if isinstance(error, CertificateError):
                raise self._unreachable(f"its certificate is not {self._server_name}'s: {error}") from error
            raise self._unreachable(str(error)) from error
        except OSError as error:
            raise self._unreachable(error.strerror or str(error)) from error
        except asyncio.CancelledError:
            if transport is not None:
                transport.abort()
            raise
        connection = Connection(self._max_bytes, self._window_bytes)
        transport.start(connection)
        try:
            await connection.ready
        except asyncio.CancelledError:
            connection.close("The channel was closed.")
            raise
        if connection.lost is not None:
            raise self._unreachable(connection.lost)
        return connection

    def _unreachable(self, why: str) -> grpc.aio.AioRpcError:
        return status.error(grpc.StatusCode.UNAVAILABLE, f"{self._address} can't be reached: {why}")


class Call:
    """A call of one request and many answers."""

    def __init__(
        self, channel: Channel, method: str, request: bytes, parse: Any, metadata: tuple[tuple[str, str], ...]
    ) -> None:
        self._channel = channel
        self._method = method
        self._request = request
        self._parse = parse
        self._metadata = metadata
        self._stream: Stream | None = None

    async def read(self) -> Any:
        """The next answer, or grpc.aio.EOF after the last. Raises AioRpcError and DecodeError."""
        if self._stream is None:
            self._stream = await self._channel.open(self._method, self._metadata)
            self._stream.send((self._request,))
            self._stream.end()
        message = await self._stream.read()
        return grpc.aio.EOF if message is None else self._parse(message)

    def cancel(self) -> None:
        """Ends it."""
        if self._stream is not None:
            self._stream.cancel()
