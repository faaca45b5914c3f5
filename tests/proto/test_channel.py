"""Binding a server: a port in use is one clear sentence. A certificate is replaced when it is renewed, only then."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from moehive.proto.channel import MAX_MESSAGE_BYTES, Identity, bind, options, server_credentials


def bound(host: str, port: int) -> int:
    """Binds a server that is never started; returns its port."""

    async def attempt() -> int:
        server = grpc.aio.server(options=options(MAX_MESSAGE_BYTES))
        try:
            return bind(server, host, port, None)
        finally:
            await server.stop(None)

    return asyncio.run(attempt())


def test_port_zero_is_any_free_port() -> None:
    assert 1024 <= bound("127.0.0.1", 0) <= 65_535


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_port_in_use(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as taken:
        try:
            taken.bind((host, 0))
        except OSError:
            pytest.skip(f"{host} is not there on this machine")
        taken.listen()
        port = taken.getsockname()[1]
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        with pytest.raises(OSError) as raised:
            bound(host, port)
    assert str(raised.value) == (
        f"Cannot listen on {shown}: the port is in use or the address is not this machine's. "
        "Stop the other program or choose another port."
    )


def test_two_servers_never_share_a_port() -> None:
    async def attempt() -> None:
        first, second = (grpc.aio.server(options=options(MAX_MESSAGE_BYTES)) for _ in range(2))
        port = bind(first, "127.0.0.1", 0, None)
        await first.start()
        try:
            with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
                bind(second, "127.0.0.1", port, None)
        finally:
            await second.stop(None)
            await first.stop(None)

    asyncio.run(attempt())


def test_an_address_that_is_not_this_machines() -> None:
    with pytest.raises(OSError, match=r"Cannot listen on 192\.0\.2\.1:0"):  # TEST-NET-1, never assigned
        bound("192.0.2.1", 0)


def test_a_certificate_is_given_to_grpc_again_only_when_it_was_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Callable[[], Any]] = []  # what gRPC calls at each handshake
    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", lambda first, again, **_: asked.append(again))
    identities = [Identity(b"key", number, b"ca") for number in (b"1", b"1", b"2", b"2")]
    coming = iter(identities)
    server_credentials(lambda: next(coming))
    assert [again() is None for again in asked * 3] == [True, False, True]
