"""The cluster's own gRPC against gRPC's library, both ways round, with and without TLS."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_channel import open_channel

from moehive.coordinator.bench.certificates import node_identity
from moehive.coordinator.cluster.trust import Authority
from moehive.proto.bounds import join_host_port
from moehive.proto.channel import MAX_MESSAGE_BYTES, node_dns_name, options
from moehive.proto.handshake import metadata
from moehive.proto.interceptor import CallGuard
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.server import Server
from moehive.proto.wire.tls import server_context

ECHO, COUNT, ONE, FAIL, HANG = (f"/test.Service/{name}" for name in ("Echo", "Count", "One", "Fail", "Hang"))
SIZES = (0, 1, 4096, 16_384 - 5, 16_384, 70_000, 1 << 20, 5_000_001)


class Service:
    """What a node's services do, in small."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.names: list[list[bytes]] = []

    async def echo(self, requests: Any, context: Any) -> None:
        self.names.append([*(context.auth_context() or {}).get("x509_subject_alternative_name", ())])
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield str(number).encode()

    async def one(self, request: bytes, context: Any) -> bytes:
        if request == b"nothing":
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is none.")
        return request[::-1]

    async def fail(self, requests: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "Nobody may: ä, 100 %.")

    async def hang(self, requests: Any, context: Any) -> None:
        await context.write(b"here")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def handlers(self) -> dict[str, Any]:
        stream = grpc.stream_stream_rpc_method_handler
        return {
            "Echo": stream(self.echo, bytes, bytes),
            "Count": grpc.unary_stream_rpc_method_handler(self.count, bytes, bytes),
            "One": grpc.unary_unary_rpc_method_handler(self.one, bytes, bytes),
            "Fail": stream(self.fail, bytes, bytes),
            "Hang": stream(self.hang, bytes, bytes),
        }


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(params=["open", "tls"])
def secure(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "tls")


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


def test_grpcs_client_asks_our_server(authority: Authority, secure: bool) -> None:
    async def main() -> None:
        service, server = Service(), Server(CallGuard({}))
        server.add_registered_method_handlers("test.Service", service.handlers())
        node = node_identity(authority, "a")
        port = await server.listen("127.0.0.1", 0, server_context(lambda: node) if secure else None)
        address = f"127.0.0.1:{port}"
        if secure:
            channel = open_channel(address, authority.issue_coordinator(), node_dns_name("a"))
        else:
            channel = grpc.aio.insecure_channel(address, options=options(MAX_MESSAGE_BYTES))
        async with channel:
            echo = channel.stream_stream(ECHO)(metadata=metadata())
            for size in SIZES:
                payload = os.urandom(size)
                await echo.write(payload)
                assert await echo.read() == payload
            await echo.done_writing()
            assert await echo.read() is grpc.aio.EOF
            assert await echo.code() is grpc.StatusCode.OK
            assert service.names == [[b"coordinator.moehive"] if secure else []]
            counted = channel.unary_stream(COUNT)(b"500", metadata=metadata())
            assert [reply async for reply in counted] == [str(number).encode() for number in range(500)]
            await _one(channel.unary_unary(ONE))
            await _refusals(lambda method, headers: channel.stream_stream(method)(metadata=headers))
            hanging = channel.stream_stream(HANG)(metadata=metadata())
            assert await hanging.read() == b"here"
            hanging.cancel()
            await service.cancelled.wait()
        await server.stop(0)

    run(main)


def test_our_client_asks_grpcs_server_and_ours(authority: Authority, secure: bool) -> None:
    async def main() -> None:
        service, node = Service(), node_identity(authority, "a")
        theirs = grpc.aio.server(interceptors=[CallGuard({})], options=options(MAX_MESSAGE_BYTES))
        theirs.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", service.handlers()),))
        if secure:
            shown = [(node.key_pem, node.chain_pem)]
            credentials = grpc.ssl_server_credentials(shown, node.ca_pem, require_client_auth=True)
            port = theirs.add_secure_port("127.0.0.1:0", credentials)
        else:
            port = theirs.add_insecure_port("127.0.0.1:0")
        await theirs.start()
        ours = Server(CallGuard({}))
        ours.add_registered_method_handlers("test.Service", service.handlers())
        second = await ours.listen("127.0.0.1", 0, server_context(lambda: node) if secure else None)
        for number in (port, second):
            identity = authority.issue_coordinator() if secure else None
            channel = Channel(f"127.0.0.1:{number}", identity, node_dns_name("a"))
            echo = await channel.open(ECHO, metadata())
            for size in SIZES:
                payload = os.urandom(size)
                echo.send((payload[: size // 3], payload[size // 3 :]))
                await echo.drain()
                assert await echo.read() == payload
            echo.end()
            assert await echo.read() is None
            counted = channel.unary_stream(COUNT, bytes, bytes)(b"500", metadata())
            assert [await counted.read() for _ in range(500)] == [str(number).encode() for number in range(500)]
            assert await counted.read() is grpc.aio.EOF

            await _one(channel.unary_unary(ONE, bytes, bytes))
            await _refusals(lambda method, headers, channel=channel: Opened(channel, method, headers))
            service.cancelled.clear()
            hanging = await channel.open(HANG, metadata())
            assert await hanging.read() == b"here"
            hanging.cancel()
            await service.cancelled.wait()
            await channel.close()
        await theirs.stop(None)
        await ours.stop(0)

    run(main)


class Opened:
    """A call of ours that is read at once, as gRPC's are."""

    def __init__(self, channel: Channel, method: str, headers: Any) -> None:
        self._opening = asyncio.ensure_future(channel.open(method, headers))

    async def read(self) -> Any:
        return await (await self._opening).read()


async def _one(ask: Any) -> None:
    """A call of one request and one answer."""
    for request in (b"", b"ab", os.urandom(100_000)):
        assert await ask(request, metadata=metadata(), timeout=20) == request[::-1]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(b"nothing", metadata=metadata(), timeout=20)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND and caught.value.details() == "There is none."


async def _refusals(call: Callable[[str, Any], Any]) -> None:
    for method, headers, code, words in (
        (FAIL, metadata(), grpc.StatusCode.PERMISSION_DENIED, "Nobody may: ä, 100 %."),
        (ECHO, (), grpc.StatusCode.FAILED_PRECONDITION, "install the same version"),
        ("/test.Service/Nothing", metadata(), grpc.StatusCode.UNIMPLEMENTED, ""),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(method, headers).read()
        assert caught.value.code() is code
        assert words in (caught.value.details() or "")


def test_a_message_over_the_limit_is_refused(authority: Authority) -> None:
    async def main() -> None:
        server = Server(CallGuard({}))
        server.add_registered_method_handlers("test.Service", Service().handlers())
        port = await server.listen("127.0.0.1", 0, None)
        channel = Channel(f"127.0.0.1:{port}", None, "a")
        echo = await channel.open(ECHO, metadata())
        echo.send((bytes(MAX_MESSAGE_BYTES + 1),))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await echo.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(MAX_MESSAGE_BYTES) in (caught.value.details() or "")
        again = await channel.open(ECHO, metadata())  # the connection goes on
        again.send((b"still here",))
        assert await again.read() == b"still here"
        await channel.close()
        await server.stop(0)

    run(main)


def test_who_is_not_of_the_cluster_gets_nowhere(authority: Authority, tmp_path: Any) -> None:
    async def main() -> None:
        server = Server(CallGuard({}))
        server.add_registered_method_handlers("test.Service", Service().handlers())
        current = node_identity(authority, "a")
        port = await server.listen("127.0.0.1", 0, server_context(lambda: current))
        address = f"127.0.0.1:{port}"
        stranger = node_identity(Authority.create(tmp_path / "elsewhere"), "b")
        half = type(stranger)(stranger.key_pem, stranger.chain_pem, authority.ca_pem)  # knows whom to believe
        member = authority.issue_coordinator()
        for identity, name in (
            (None, "a"),
            (stranger, node_dns_name("a")),
            (half, node_dns_name("a")),
            (member, node_dns_name("b")),
        ):
            channel = Channel(address, identity, name)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (await channel.open(ECHO, metadata())).read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            await channel.close()
        renewed = current = node_identity(authority, "a2")  # a new certificate is used from the next handshake on
        assert renewed is current
        channel = Channel(address, member, node_dns_name("a2"))
        echo = await channel.open(ECHO, metadata())
        echo.send((b"hello",))
        assert await echo.read() == b"hello"
        await channel.close()
        await server.stop(0)

    run(main)


def test_a_call_that_is_not_answered_in_time_or_not_with_one_message() -> None:
    async def main() -> None:
        service, server = Service(), Server(CallGuard({}))
        server.add_registered_method_handlers("test.Service", service.handlers())
        port = await server.listen("127.0.0.1", 0, None)
        channel = Channel(f"127.0.0.1:{port}", None, "a")
        assert not channel.over
        with pytest.raises(grpc.aio.AioRpcError, match="not one message"):
            await channel.unary_unary(COUNT, bytes, bytes)(b"2", metadata(), 20)
        with pytest.raises(grpc.aio.AioRpcError, match="not one message"):
            await channel.unary_unary(COUNT, bytes, bytes)(b"0", metadata(), 20)
        with pytest.raises(grpc.aio.AioRpcError, match="not answered"):
            await channel.unary_unary(HANG, bytes, bytes)(b"", metadata(), 0.01)
        await service.cancelled.wait()
        assert not channel.over
        await server.stop(0)
        assert await (await channel.connect()).sender.progress() is None
        assert channel.over
        await channel.close()
        refused = Channel(f"127.0.0.1:{port}", None, "a")
        with pytest.raises(grpc.aio.AioRpcError, match="can't be reached"):
            await refused.connect()
        assert refused.over

    run(main)


def test_all_addresses_are_those_of_both_kinds() -> None:
    async def main() -> None:
        seen: list[str] = []

        async def tell(requests: Any, context: Any) -> None:
            seen.append(context.caller.host)
            await context.write(b"")

        server = Server(CallGuard({}))
        handler = grpc.stream_stream_rpc_method_handler(tell, bytes, bytes)
        server.add_registered_method_handlers("test.Service", {"Tell": handler})
        port = await server.listen("0.0.0.0", 0, None)
        hosts = ["127.0.0.1", "::1"] if socket.has_dualstack_ipv6() else ["127.0.0.1"]
        for host in hosts:
            channel = Channel(join_host_port(host, port), None, "a")
            assert await (await channel.open("/test.Service/Tell", metadata())).read() == b""
            await channel.close()
        assert seen == hosts
        await server.stop(0)

    run(main)
