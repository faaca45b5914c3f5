"""What the other side may send, and how it may stop sending: no error but ours, bounded memory, nobody waits long."""

import asyncio
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio
import hpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moehive.proto.handshake import metadata
from moehive.proto.interceptor import CallGuard
from moehive.proto.wire import frames, keepalive
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.connection import Connection
from moehive.proto.wire.server import Server
from moehive.proto.wire.stream import Stream
from moehive.proto.wire.tls import OtherSide

EXAMPLES = int(os.environ.get("MOEHIVE_FUZZ_EXAMPLES", "200"))
MAX_BYTES, WINDOW = 1 << 16, 1 << 17


class Transport:
    """Takes what a connection writes."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.closed = False

    def speaks_http2(self) -> bool:
        return True

    def other_side(self) -> OtherSide:
        return OtherSide()

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def writelines(self, pieces: Sequence[bytes]) -> None:
        self.write(b"".join(pieces))

    def close(self) -> None:
        self.closed = True

    abort = close


class Keeper:
    """Answers calls by keeping them."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def made(self, connection: Connection) -> None:
        pass

    def called(self, connection: Connection, stream: Stream) -> None:
        self.streams.append(stream)

    def gone(self, connection: Connection) -> None:
        pass


def serving(max_bytes: int = MAX_BYTES, window: int = WINDOW) -> tuple[Connection, Transport, Keeper]:
    keeper, transport = Keeper(), Transport()
    connection = Connection(max_bytes, window, keeper)
    connection.connection_made(transport)  # type: ignore[arg-type]  # as much of one as is used
    return connection, transport, keeper


def feed(connection: Connection, data: bytes, step: int = 1 << 20) -> None:
    """As a transport would, in pieces of at most `step` bytes."""
    while data and connection.lost is None:
        room = connection.get_buffer(-1)
        part = data[: min(step, len(room))]
        room[: len(part)] = part
        connection.buffer_updated(len(part))
        data = data[len(part) :]


def call(number: int = 1, *, end: bool = False) -> bytes:
    fields = [(":method", "POST"), (":path", "/a/B"), ("content-type", "application/grpc")]
    return frames.headers(number, hpack.Encoder().encode(fields), 1 << 14, end=end)


def data(payload: bytes, number: int = 1, flags: int = 0) -> bytes:
    return frames.frame(frames.DATA, flags, number, payload)


def message(payload: bytes) -> bytes:
    return struct.pack(">BI", 0, len(payload)) + payload


OPENING = frames.PREFACE + frames.settings({})
payloads = st.binary(max_size=64)
plausible = st.builds(
    frames.frame,
    st.sampled_from([*range(10), 77]),
    st.integers(0, 255),
    st.sampled_from([0, 1, 2, 3, 5, 1 << 30]),
    payloads | st.sampled_from([bytes(4), bytes(8), struct.pack(">I", 1 << 31), struct.pack(">HI", 5, 0)]),
)
pieces = plausible | st.just(call()) | st.just(call(3)) | payloads.map(lambda p: data(message(p))) | payloads


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(pieces, max_size=12), st.integers(1, 200), st.booleans())
def test_whatever_comes_only_ends_the_connection(parts: list[bytes], step: int, opened: bool) -> None:
    async def main() -> None:
        connection, transport, keeper = serving()
        feed(connection, (OPENING if opened else b"") + b"".join(parts), step)
        connection.close("The test is over.")
        assert transport.closed
        assert all(stream.ended for stream in keeper.streams)

    asyncio.run(main())


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.binary(max_size=3000), max_size=6), st.integers(1, 4000), st.integers(1, 5000))
def test_messages_come_whole_however_they_are_cut(messages: list[bytes], cut: int, step: int) -> None:
    """Into frames of any size, which come in pieces of any size."""

    async def main() -> None:
        connection, _, keeper = serving()
        stream = b"".join(map(message, messages))
        framed = b"".join(data(stream[at : at + cut]) for at in range(0, len(stream), cut))
        feed(connection, OPENING + call() + framed + data(b"", flags=frames.END_STREAM), step)
        assert connection.lost is None
        got = []
        while (one := await keeper.streams[0].read()) is not None:
            got.append(bytes(one))
        assert got == messages
        connection.close("The test is over.")

    asyncio.run(main())


@pytest.mark.parametrize("cut", [40_000, 1 << 19, 1 << 20])
@pytest.mark.parametrize("step", [7_001, 16_384, 1 << 20])
def test_large_messages_come_whole_between_small_ones(cut: int, step: int) -> None:
    """They are received in place, what is around them in the connection's own buffer."""

    async def main() -> None:
        connection, _, keeper = serving(1 << 20, 8 << 20)
        sizes = (200_000, 1 << 19, 1 << 19, 10, 140_000, 0, 33_000, 1 << 20, 5)
        messages = [os.urandom(size) for size in sizes]
        stream = b"".join(map(message, messages))
        framed = b"".join(data(stream[at : at + cut]) for at in range(0, len(stream), cut))
        feed(connection, OPENING + call() + framed + data(b"", flags=frames.END_STREAM), step)
        assert [bytes(await keeper.streams[0].read() or b"") for _ in messages] == messages
        assert await keeper.streams[0].read() is None
        connection.close("The test is over.")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: moehive\r\n\r\n", "does not speak HTTP/2"),
        (OPENING + data(b"x", number=1), "never was"),
        (OPENING + call(2), "odd"),
        (OPENING + call()[:-1] + b"\xff" + frames.frame(frames.CONTINUATION, 0, 1), "can't be read|never began"),
        (OPENING + frames.frame(frames.HEADERS, 0, 1, b"") + frames.frame(frames.PING, 0, 0, bytes(8)), "cut"),
        (OPENING + frames.header(1 << 20, frames.SETTINGS, 0, 0), "too large"),
        (OPENING + frames.window_update(0, frames.LARGEST_WINDOW), "window"),
        (OPENING + call() + data(bytes(5)) * 9000 + data(bytes(1 << 14)) * 9, "window"),
        (OPENING + call(end=True) + data(b"x"), "after a stream's end"),
    ],
)
def test_a_broken_protocol_is_named(sent: bytes, words: str) -> None:
    async def main() -> None:
        connection, transport, _ = serving()
        feed(connection, sent)
        assert connection.lost is not None
        assert any(word in connection.lost for word in words.split("|"))
        assert frames.GOAWAY in transport.written  # the other side is told
        assert transport.closed

    asyncio.run(main())


def test_who_asks_and_does_not_listen_is_left() -> None:
    async def main() -> None:
        connection, transport, _ = serving()
        feed(connection, OPENING)
        connection.pause_writing()
        feed(connection, frames.frame(frames.PING, 0, 0, bytes(8)) * 2000)
        assert connection.lost is not None and "listen" in connection.lost
        assert len(transport.written) < 100_000

    asyncio.run(main())


@pytest.mark.parametrize("asking", [True, False])
def test_who_waits_to_send_on_a_stream_that_has_ended_is_let_go(asking: bool) -> None:
    """The other side takes no more of it: its answer was over before the question was, or this side gave it up."""

    async def main() -> None:
        if asking:
            connection = Connection(MAX_BYTES, WINDOW)
            connection.connection_made(Transport())  # type: ignore[arg-type]
            feed(connection, frames.settings({}))
            stream = connection.open([(":method", "POST")])
        else:
            connection, _, keeper = serving()
            feed(connection, OPENING + call())
            stream = keeper.streams[0]
        stream.send((bytes(1 << 20),))
        assert stream.outgoing
        drained = asyncio.create_task(stream.drain())
        await asyncio.sleep(0)
        if asking:
            answer = hpack.Encoder().encode([(":status", "200"), ("grpc-status", "0")])
            feed(connection, frames.headers(1, answer, 1 << 14, end=True))
        else:
            stream.end([("grpc-status", "0")])
        await asyncio.wait_for(drained, 10)
        stream.send((bytes(1 << 20),))
        assert not stream.outgoing
        connection.close("The test is over.")

    asyncio.run(main())


def test_nobody_waits_to_send_on_a_connection_that_is_over() -> None:
    """Also on a stream that had ended well before, of which the connection knows no more."""

    async def main() -> None:
        connection, _, keeper = serving()
        feed(connection, OPENING + call())
        stream = keeper.streams[0]
        connection.pause_writing()
        stream.end([("grpc-status", "0")])
        drained = asyncio.create_task(stream.drain())
        await asyncio.sleep(0)
        assert not drained.done()
        connection.close("The test is over.")
        await asyncio.wait_for(drained, 10)

    asyncio.run(main())


def run(main: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


METHOD = "/test.Service/Method"


async def connected(behavior: Any) -> tuple[Server, Channel]:
    """A server whose one method does that, and a channel to it."""
    server = Server(CallGuard({}))
    handler = grpc.stream_stream_rpc_method_handler(behavior, bytes, bytes)
    server.add_registered_method_handlers("test.Service", {"Method": handler})
    port = await server.listen("127.0.0.1", 0, None)
    return server, Channel(f"127.0.0.1:{port}", None, "a")


def test_a_reader_that_rests_holds_the_writer_back() -> None:
    """Nothing is sent beyond the window, by us or by gRPC's client, and all of it comes once it is read."""

    async def main() -> None:
        go_on = asyncio.Event()
        read: list[int] = []

        async def slow(requests: Any, context: Any) -> None:
            await go_on.wait()
            while (request := await context.read()) is not grpc.aio.EOF:
                read.append(len(request))

        server, channel = await connected(slow)
        stream = await channel.open(METHOD, metadata())
        sent = 0
        while not stream.outgoing:
            stream.send((bytes(8 << 20),))
            sent += 1
        assert sent <= 14  # of 96 MiB
        drained = asyncio.create_task(stream.drain())
        await asyncio.sleep(0)
        assert not drained.done()
        go_on.set()
        await drained
        stream.end()
        assert await stream.read() is None
        assert read == [8 << 20] * sent
        await channel.close()
        await server.stop(0)

    run(main)


def test_a_silent_other_side_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepalive, "TICK_SECONDS", 0.01)

    async def main() -> None:
        async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        silent = await asyncio.start_server(nothing, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        with pytest.raises(grpc.aio.AioRpcError, match="silent"):
            await Channel(f"127.0.0.1:{port}", None, "a").open("/a/B", ())
        silent.close()
        refused = Channel(f"127.0.0.1:{port}", None, "a")
        with pytest.raises(grpc.aio.AioRpcError, match="can't be reached"):
            await refused.open("/a/B", ())

    run(main)


def test_a_server_that_ends_says_so() -> None:
    async def main() -> None:
        async def hang(requests: Any, context: Any) -> None:
            await context.write(b"here")
            await asyncio.Event().wait()

        server, channel = await connected(hang)
        stream = await channel.open(METHOD, metadata())
        assert await stream.read() == b"here"
        await server.stop(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.open(METHOD, metadata())
        await channel.close()

    run(main)
