"""A large message that comes in pieces is read to its end, though the loop is not woken for each of them."""

import asyncio
import random
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import hpack
import pytest

from moehive.coordinator.bench.certificates import node_identity
from moehive.coordinator.cluster.trust import Authority
from moehive.proto.handshake import metadata
from moehive.proto.interceptor import CallGuard
from moehive.proto.wire import frames, transport
from moehive.proto.wire.messages import prefix
from moehive.proto.wire.server import Server
from moehive.proto.wire.tls import server_context
from moehive.proto.wire.windows import Sending

METHOD = "/test.Service/Count"


async def serving(identity: Any) -> tuple[Server, int]:
    """A server that answers each message with its first and last byte."""

    async def ends(requests: Any, context: Any) -> None:
        while (message := await context.read_message()) is not None:
            await context.write((bytes((message[0], message[-1])),))

    server = Server(CallGuard({}), 1 << 20)
    handler = grpc.stream_stream_rpc_method_handler(ends, bytes, bytes)
    server.add_registered_method_handlers("test.Service", {"Count": handler})
    return server, await server.listen("127.0.0.1", 0, None if identity is None else server_context(lambda: identity))


class Caller:
    """Sends bytes in pieces that know nothing of TLS's records, each when the other side has read those before it."""

    def __init__(self, port: int, context: ssl.SSLContext | None) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._came, self._leaves = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = None if context is None else context.wrap_bio(self._came, self._leaves, False, "a")
        self._plain = b""

    async def shake_hands(self) -> None:
        while self._tls is not None:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.send(self._leaves.read(), 1 << 20)
                self._came.write(await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16))
            else:
                return

    def encrypted(self, data: bytes) -> bytes:
        if self._tls is None:
            return data
        while data:
            data = data[self._tls.write(data) :]
        return self._leaves.read()

    async def send(self, data: bytes, size: int) -> None:
        """In pieces of at most `size` bytes."""
        while data:
            part = random.Random(len(data)).randint(1, size)
            await asyncio.get_running_loop().sock_sendall(self._socket, data[:part])
            data = data[part:]
            for _ in range(3):
                await asyncio.sleep(0)

    async def answer(self) -> bytes:
        """The next message's content."""
        while True:
            length, kind = int.from_bytes(self._plain[:3], "big"), self._plain[3:4]
            if len(self._plain) >= frames.HEADER_BYTES + length and kind:
                content = self._plain[frames.HEADER_BYTES : frames.HEADER_BYTES + length]
                self._plain = self._plain[frames.HEADER_BYTES + length :]
                if kind[0] == frames.DATA:
                    return content[5:]
                continue
            data = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
            assert data
            if self._tls is None:
                self._plain += data
            else:
                self._came.write(data)
                with suppress(ssl.SSLWantReadError):
                    while True:
                        self._plain += self._tls.read(1 << 16)

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("piece", [3_000, 20_000, 70_000])
def test_a_message_in_pieces_is_read_to_its_end(
    secure: bool, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "WAKE_SECONDS", 1e9)  # as if pieces came at once: the fewest wakes
    wakes: list[int] = []
    wake_at = transport.Transport._wake_at

    def noted(self: transport.Transport, size: int) -> None:
        wakes.append(size)
        wake_at(self, size)

    monkeypatch.setattr(transport.Transport, "_wake_at", noted)
    authority = Authority.create(tmp_path / "authority")
    ours = authority.issue_coordinator()

    def context() -> ssl.SSLContext:
        for name, pem in (("key", ours.key_pem), ("chain", ours.chain_pem)):
            (tmp_path / name).write_bytes(pem)
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.check_hostname = False
        made.load_verify_locations(cadata=ours.ca_pem.decode())
        made.load_cert_chain(tmp_path / "chain", tmp_path / "key")
        made.set_alpn_protocols(["h2"])
        return made

    async def main() -> None:
        server, port = await serving(node_identity(authority, "a") if secure else None)
        caller = Caller(port, context() if secure else None)
        await caller.shake_hands()
        fields = [(":method", "POST"), (":path", METHOD), ("content-type", "application/grpc"), *metadata()]
        headers = frames.headers(1, hpack.Encoder().encode(fields), 1 << 14, end=False)
        opening = frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 30}) + headers
        await caller.send(caller.encrypted(opening), 1 << 20)
        for number, size in enumerate((1, 40_000, 300_000, 17_000, 250_001, 2)):
            message = bytes([number]) * size
            frame = frames.frame(frames.DATA, 0, 1, prefix(size) + message)
            await caller.send(caller.encrypted(frame), piece)
            assert await caller.answer() == bytes([number, number])
        caller.close()
        await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 60))
    assert max(wakes) > 1  # it was not woken for each piece


class Closes:
    """Who uses a transport and ends it when a part of a large message has come."""

    missing = 1 << 20
    read_at = 0

    def __init__(self, its: transport.Transport) -> None:
        self.sending = Sending()
        self._its = its

    def serve(self) -> None:
        return None

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(bytearray(1 << 16))

    def buffer_updated(self, nbytes: int) -> None:
        self._its.close()

    def connection_lost(self, exc: Exception | None) -> None:
        pass


def test_a_connection_that_ends_in_the_middle_of_a_message_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "WAKE_SECONDS", 1e9)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        ours.setblocking(False)
        end = transport.Transport(ours)
        end._told = Closes(end)  # type: ignore[assignment]
        theirs.sendall(bytes(30_000))
        end.read()
        assert ours.fileno() == -1
        theirs.close()

    asyncio.run(main())
