"""HTTP without surprises: bounded bodies, clients that leave, and a server that lives on the caller's loop."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar

import uvicorn
from fastapi import Request, Response

from ..types import CoordinatorError, InvalidRequest
from .doors import CheckKey, Tls, check_may_open

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 20
STOP_SECONDS = 2  # for requests that still run when the door closes
Receive = Callable[[], Awaitable[Any]]
T = TypeVar("T")


class BodyTooLarge(CoordinatorError):
    """A request's body is above MAX_BODY_BYTES."""


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


async def read_json(request: Request) -> Any:
    """The body as JSON. Raises BodyTooLarge, or InvalidRequest when it is no JSON."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"The request's body has more than {MAX_BODY_BYTES >> 20} MiB; send less.")
    try:
        text = body.decode("utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair is valid JSON and no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The request's body is not valid JSON: {str(error)[:200]}.") from error
    return value


async def unless_client_leaves(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away: then raises ClientLeft.

    `receive` is the ASGI channel of a request whose body has been read.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for unfinished in (task, leaving):
            unfinished.cancel()
        await asyncio.wait([task, leaving])


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from a generator of texts, which is closed when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Any, receive: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        """ASGI."""

        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._events) as events:
                async for event in events:
                    data = f"data: {event}\n\n".encode()
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        with suppress(ClientLeft):
            await unless_client_leaves(receive, write())


class _Server(uvicorn.Server):
    """Leaves signals to the program that it runs in, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class HttpDoor:
    """A running server; `port` is where."""

    def __init__(self, server: _Server, task: asyncio.Task[None], port: int) -> None:
        self._server = server
        self._task = task
        self.port = port

    def show(self, tls: Tls) -> None:
        """Shows another certificate from the next connection on; only for a door that was opened with one."""
        context = self._server.config.ssl
        assert context is not None
        context.load_cert_chain(tls.chain_file, tls.key_file)

    async def stop(self) -> None:
        """Takes no new requests and returns when the running ones are done, or after STOP_SECONDS."""
        self._server.should_exit = True
        await self._task


async def serve_http(
    host: str, port: int, app: Any, tls: Tls | None = None, check_key: CheckKey | None = None
) -> HttpDoor:
    """Serves an ASGI `app` (which asks for the keys itself) on host:port; 0: any free port.

    Raises CoordinatorError for an address that would be open to others, OSError with a sentence for a port in use.
    """
    check_may_open(host, tls, check_key)
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        ssl_certfile=None if tls is None else tls.chain_file,
        ssl_keyfile=None if tls is None else tls.key_file,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([listener]))
    ready = asyncio.create_task(server.listening.wait())
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        ready.cancel()
        listener.close()
        task.result()
        raise CoordinatorError(f"The HTTP server on {host}:{port} did not start; its log has the reason.")
    return HttpDoor(server, task, listener.getsockname()[1])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OSError(
            f"Cannot listen on {host}:{port} for HTTP: {error.strerror or error}. Stop the other program or choose "
            "another port."
        ) from error
