"""What a hop is compared with: an echo of the same bytes over blocking TCP, and over a bare grpc.aio stream.

gRPC runs with its default settings here, event engine included, and asyncio with its own loop: what a program gets
that does nothing special. Both ends are processes of their own.
"""

import asyncio
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

_METHOD = "/moehive.bench.Echo/Stream"
_SIZES = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def _serve_raw() -> int:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while header := _receive(connection, 8):
            connection.sendall(_receive(connection, int.from_bytes(header, "little")))

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def _receive(connection: socket.socket, count: int) -> bytes | bytearray:
    """Exactly `count` bytes; none when the other side has ended."""
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        size = connection.recv_into(view[got:])
        if size == 0:
            return b""
        got += size
    return data


async def _serve() -> None:
    """Both servers, until stdin ends."""

    async def echo(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    server = grpc.aio.server(options=_SIZES)
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("moehive.bench.Echo", {"Stream": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"raw": _serve_raw(), "plain": port}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # connections are still open, and nobody waits for them


class _Raw:
    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def measure(self, payload: bytes, count: int) -> list[float]:
        header = len(payload).to_bytes(8, "little")
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self._connection.sendall(header + payload if len(payload) < 1 << 16 else header)
            if len(payload) >= 1 << 16:
                self._connection.sendall(payload)
            _receive(self._connection, len(payload))
            times.append(time.perf_counter() - start)
        return times


class _Plain:
    def __init__(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=_SIZES)
        self._call: Any = self._channel.stream_stream(_METHOD)()

    async def measure(self, payload: bytes, count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            await self._call.write(payload)
            await self._call.read()
            times.append(time.perf_counter() - start)
        return times


async def _ask() -> None:
    """Measures what each line of stdin says: {"way", "port", "payload_bytes", "count"}; answers in seconds."""
    raw: dict[int, _Raw] = {}
    plain: dict[int, _Plain] = {}
    print(json.dumps("ready"), flush=True)
    while select.select([sys.stdin], [], [])[0] and (line := sys.stdin.readline()):
        order = json.loads(line)
        port, payload = order["port"], bytes(order["payload_bytes"])
        if order["way"] == "raw":
            times = raw.setdefault(port, _Raw(port)).measure(payload, order["count"])
        else:
            if port not in plain:
                plain[port] = _Plain(port)
            times = await plain[port].measure(payload, order["count"])
        print(json.dumps(times), flush=True)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_serve() if sys.argv[1] == "serve" else _ask())
