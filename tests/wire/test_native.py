"""Messages that native code takes as they are read: the same come and go as without it, however they are cut."""

import asyncio
import ctypes
import selectors
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import hpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moehive.coordinator.bench.certificates import node_identity
from moehive.coordinator.cluster.trust import Authority
from moehive.proto.channel import node_dns_name
from moehive.proto.handshake import metadata
from moehive.proto.interceptor import CallGuard
from moehive.proto.lookout import ThisMachine
from moehive.proto.wire import frames
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.messages import prefix
from moehive.proto.wire.server import Server
from moehive.proto.wire.tls import TlsError, server_context
from moehive.proto.wire.windows import HEAD_BYTES, Times

METHOD = "/test.Service/Reverse"
LARGEST, MAX_BYTES = 300_000, 300_010
_TAKE = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.POINTER(Times),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_int64),
)


class Reverser:
    """Takes messages, but for empty ones and those of 3 n + 2 bytes, and answers each with its bytes in reverse."""

    def __init__(self) -> None:
        self.taken = 0
        self.told = self.turns = 0
        self.patience: tuple[int | None, int] = None, 0
        self.several = asyncio.Event()
        self._room = ctypes.create_string_buffer(HEAD_BYTES + MAX_BYTES)
        self._call = _TAKE(self._take)
        self.function = ctypes.cast(self._call, ctypes.c_void_p).value or 0
        self.context = 0

    def ready(self) -> bool:
        return True

    def took(self, messages: int) -> None:
        self.told += messages
        self.turns += messages > 0

    def _take(self, context: int, message: int, size: int, times: Any, reply: Any, reply_size: Any) -> int:
        if size % 3 == 2 or size == 0:
            return 0
        at = ctypes.addressof(self._room) + HEAD_BYTES
        ctypes.memmove(at, ctypes.string_at(message, size)[::-1], size)
        reply[0], reply_size[0] = at, size
        self.taken += 1
        if self.taken == 4:
            self.several.set()
        return 1


async def serving(taker: Reverser, identity: Any = None, max_bytes: int = MAX_BYTES) -> tuple[Server, int]:
    """A server that reverses: what the taker leaves, in Python."""

    async def reverse(requests: Any, context: Any) -> None:
        context.take_natively(taker)
        while (message := await context.read_message()) is not None:
            await context.write((bytes(message)[::-1],))

    server = Server(CallGuard({}), max_bytes)
    handler = grpc.stream_stream_rpc_method_handler(reverse, bytes, bytes)
    server.add_registered_method_handlers("test.Service", {"Reverse": handler})
    return server, await server.listen("127.0.0.1", 0, None if identity is None else server_context(lambda: identity))


def run(main: Any) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


sizes = st.integers(0, 100) | st.integers(0, 9000) | st.integers(0, LARGEST)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(sizes, min_size=1, max_size=20), secure=st.booleans(), data=st.data())
def test_every_message_is_answered_once(
    authority: Authority, lengths: list[int], secure: bool, data: st.DataObject
) -> None:
    messages = [number.to_bytes(2, "big") * (length // 2 + 1) for number, length in enumerate(lengths, start=1)]
    rests = [data.draw(st.booleans()) for _ in messages]

    async def main() -> None:
        taker = Reverser()
        node = node_identity(authority, "a") if secure else None
        server, port = await serving(taker, node)
        channel = Channel(f"127.0.0.1:{port}", authority.issue_coordinator() if secure else None, node_dns_name("a"))
        stream = await channel.open(METHOD, metadata())
        for message, rest in zip(messages, rests, strict=True):
            stream.send((message,))
            if rest:
                await asyncio.sleep(0)
        stream.end()
        got = []
        while (reply := await stream.read()) is not None:
            got.append(bytes(reply))
        assert Counter(got) == Counter(message[::-1] for message in messages)
        assert taker.told == taker.taken
        await channel.close()
        await server.stop(0)

    run(main)


def opening() -> bytes:
    """A caller's first bytes, up to the headers of its one call."""
    fields = [(":method", "POST"), (":path", METHOD), ("content-type", "application/grpc"), *metadata()]
    return (
        frames.PREFACE + frames.settings({}) + frames.headers(1, hpack.Encoder().encode(fields), 1 << 14, end=False)
    )


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(st.binary(max_size=400), min_size=1, max_size=12),
    step=st.integers(1, 900),
    cut=st.integers(1, 300) | st.none(),
    pings=st.booleans(),
)
def test_whatever_the_pieces_that_come(messages: list[bytes], step: int, cut: int | None, pings: bool) -> None:
    """Frames that are whole messages, or not; other frames between them; bytes that come in pieces of any size."""
    stream = b""
    for message in messages:
        whole = prefix(len(message)) + message
        parts = [whole] if cut is None else [whole[at : at + cut] for at in range(0, len(whole), cut)]
        stream += b"".join(frames.frame(frames.DATA, 0, 1, part) for part in parts)
        if pings:
            stream += frames.frame(frames.PING, 0, 0, bytes(8))
    stream += frames.frame(frames.DATA, frames.END_STREAM, 1)

    async def main() -> None:
        taker = Reverser()
        server, port = await serving(taker)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer.write(opening())
        for at in range(0, len(stream), step):
            writer.write(stream[at : at + step])
            await asyncio.sleep(0)
        got, ended = b"", False
        while not ended:
            _, kind, flags, _, payload = await one_frame(reader)
            got += payload if kind == frames.DATA else b""
            ended = kind == frames.HEADERS and bool(flags & frames.END_STREAM)
        assert Counter(whole_messages(got)) == Counter(message[::-1] for message in messages)
        writer.close()
        await server.stop(0)

    run(main)


@pytest.mark.skipif(not hasattr(selectors, "EpollSelector"), reason="only Linux has what is looked with")
@pytest.mark.parametrize("look", [0, 100_000])
@pytest.mark.parametrize("odd", [None, "ping", "not taken", "in pieces"])
def test_messages_that_follow_each_other_are_waited_for_without_the_loop(look: int, odd: str | None) -> None:
    """By a caller on a thread of its own, which sends the next one when it has the answer."""
    messages = [bytes([number]) * (3 * number + 1) for number in range(1, 61)]
    if odd == "not taken":
        messages[20] = b"ab"
    frame = {message: frames.frame(frames.DATA, 0, 1, prefix(len(message)) + message) for message in messages}

    def ask(port: int) -> list[bytes]:
        with socket.create_connection(("127.0.0.1", port)) as ours, ours.makefile("rb") as file:
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ours.sendall(opening() + frames.frame(frames.DATA, 0, 1, prefix(2) + b"ab"))
            got = []
            for number, message in enumerate([b"ab", *messages]):
                if number:
                    pieces = [frame[message]]
                    if number == 20 and odd == "ping":
                        pieces = [frame[message] + frames.frame(frames.PING, 0, 0, bytes(8))]
                    if number == 20 and odd == "in pieces":
                        pieces = [frame[message][:20], frame[message][20:]]
                    for piece in pieces:
                        ours.sendall(piece)
                kind = payload = None
                while kind != frames.DATA:
                    head = file.read(frames.HEADER_BYTES)
                    kind, payload = head[3], file.read(int.from_bytes(head[:3], "big"))
                got += whole_messages(payload or b"")
            return got

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        eyes = ThisMachine(loop._selector.fileno())
        taker = Reverser()
        taker.patience = eyes.native_at, look
        server, port = await serving(taker)
        got = await asyncio.to_thread(ask, port)
        assert got == [message[::-1] for message in (b"ab", *messages)]
        assert taker.told == taker.taken == len(messages) - (odd == "not taken")
        assert taker.turns < taker.told  # else each message had a turn of the loop
        await server.stop(0)

    run(main)


def test_who_reads_late_gets_every_answer_in_order() -> None:
    """Beyond the caller's window, and beyond what the sockets hold, answers wait; nothing overtakes anything."""
    messages = [number.to_bytes(3, "big") * 5000 for number in range(2000)]  # 30 MB, all taken natively

    async def main() -> None:
        taker = Reverser()
        server, port = await serving(taker, max_bytes=32 << 20)  # which the caller may send before they are read
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        writer.write(opening() + frames.frame(frames.DATA, 0, 1, prefix(2) + b"ab"))
        while (await one_frame(reader))[1] != frames.DATA:  # answered in Python, which has begun to read
            pass

        async def ask() -> None:
            for message in messages:
                writer.write(frames.frame(frames.DATA, 0, 1, prefix(len(message)) + message))
                await writer.drain()
            writer.write(frames.frame(frames.DATA, frames.END_STREAM, 1))

        asking = asyncio.create_task(ask())
        await taker.several.wait()  # the window of 64 KiB is full
        writer.write(frames.window_update(1, 1 << 30) + frames.window_update(0, 1 << 30))
        await asking
        got, ended = bytearray(), False
        while not ended:
            _, kind, flags, _, payload = await one_frame(reader)
            got += payload if kind == frames.DATA else b""
            ended = kind == frames.HEADERS and bool(flags & frames.END_STREAM)
        assert whole_messages(bytes(got)) == [message[::-1] for message in messages]
        writer.close()
        await server.stop(0)

    run(main)


def test_a_call_that_was_ended_here_takes_nothing_more() -> None:
    """What its caller still sends is dropped, and other calls on the connection go on."""

    async def main() -> None:
        taker = Reverser()

        async def once(requests: Any, context: Any) -> None:
            context.take_natively(taker)
            await context.read_message()

        server = Server(CallGuard({}))
        handler = grpc.stream_stream_rpc_method_handler(once, bytes, bytes)
        server.add_registered_method_handlers("test.Service", {"Reverse": handler})
        port = await server.listen("127.0.0.1", 0, None)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(opening() + frames.frame(frames.DATA, 0, 1, prefix(2) + b"ab"))
        ended = False
        while not ended:
            _, kind, flags, _, _ = await one_frame(reader)
            ended = kind == frames.HEADERS and bool(flags & frames.END_STREAM)
        writer.write(frames.frame(frames.DATA, 0, 1, prefix(3) + b"abc") * 3)
        writer.write(frames.frame(frames.PING, 0, 0, bytes(8)))
        while (found := await one_frame(reader))[1] != frames.PING:
            assert found[1] in (frames.SETTINGS, frames.WINDOW_UPDATE)
        assert taker.taken == 0
        writer.close()
        await server.stop(0)

    run(main)


async def one_frame(reader: asyncio.StreamReader) -> tuple[int, int, int, int, bytes]:
    head = await reader.readexactly(frames.HEADER_BYTES)
    length = int.from_bytes(head[:3], "big")
    return length, head[3], head[4], int.from_bytes(head[5:], "big"), await reader.readexactly(length)


def whole_messages(data: bytes) -> list[bytes]:
    found = []
    while data:
        length = int.from_bytes(data[1:5], "big")
        found.append(data[5 : 5 + length])
        data = data[5 + length :]
    return found


def test_a_key_or_certificate_that_is_none_is_said(authority: Authority) -> None:
    identity = node_identity(authority, "a")
    for broken in (
        type(identity)(b"nothing", identity.chain_pem, identity.ca_pem),
        type(identity)(identity.key_pem, b"", identity.ca_pem),
        type(identity)(identity.key_pem, identity.chain_pem, b"nothing"),
        type(identity)(node_identity(authority, "b").key_pem, identity.chain_pem, identity.ca_pem),
    ):
        with pytest.raises(TlsError, match="does not take a key or certificate"):
            server_context(lambda broken=broken: broken)


def test_a_handshake_that_never_ends_is_given_up(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who connects and says nothing, or nonsense, holds no place for long, and others are let in meanwhile."""
    from moehive.proto.wire import server as servers

    monkeypatch.setattr(servers, "HANDSHAKE_SECONDS", 0.05)

    async def main() -> None:
        node = node_identity(authority, "a")
        server, port = await serving(Reverser(), node)
        silent, _ = await asyncio.open_connection("127.0.0.1", port)
        noisy, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 10)
        assert await silent.read() == b""
        await noisy.read()
        channel = Channel(f"127.0.0.1:{port}", authority.issue_coordinator(), node_dns_name("a"))
        stream = await channel.open(METHOD, metadata())
        stream.send((b"abcd",))
        assert await stream.read() == b"dcba"
        assert not server._welcoming
        await channel.close()
        await server.stop(0)

    run(main)


def test_a_server_that_does_not_shake_hands_is_given_up(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moehive.proto.wire import channel as channels

    monkeypatch.setattr(channels, "CONNECT_SECONDS", 0.05)

    async def main() -> None:
        async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        silent = await asyncio.start_server(nothing, "127.0.0.1", 0)
        address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        channel = Channel(address, authority.issue_coordinator(), node_dns_name("a"))
        with pytest.raises(grpc.aio.AioRpcError, match="did not answer within"):
            await channel.open(METHOD, metadata())
        assert channel.over
        silent.close()

    run(main)


def test_a_system_without_openssl_is_said(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moehive.proto.wire import tls

    class Without:
        @staticmethod
        def moehive_tls_there() -> int:
            return 0

    monkeypatch.setattr(tls, "library", Without)
    with pytest.raises(TlsError, match="OpenSSL 3"):
        tls.server_context(lambda: node_identity(authority, "a"))
