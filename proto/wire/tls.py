"""Both sides' certificates as OpenSSL wants them. Whom a certificate is for is a name in it, not an address."""

import asyncio
import os
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..channel import Identity


class OtherSide(NamedTuple):
    """Who is at a connection's other end, as far as the connection itself says."""

    host: str = ""  # its IP address
    names: tuple[str, ...] = ()  # the DNS names in its certificate; none without one
    certificate: bytes = b""  # DER


def other_side(transport: asyncio.BaseTransport) -> OtherSide:
    """Of a transport whose handshake is done."""
    address: tuple[Any, ...] = transport.get_extra_info("peername") or ("",)
    host = str(address[0]).removeprefix("::ffff:")  # IPv4 on a socket that takes both
    secured: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    if secured is None:
        return OtherSide(host)
    alternatives: Any = (secured.getpeercert() or {}).get("subjectAltName", ())
    names = tuple(name for kind, name in alternatives if kind == "DNS")
    return OtherSide(host, names, secured.getpeercert(binary_form=True) or b"")


class _Direct(ssl.SSLObject):
    """Gives the event loop OpenSSL's binding itself for what it calls for each 16 KiB of data.

    SSLObject's own methods only pass their arguments on, which takes as long as everything else in Python about them.
    """

    read: Callable[..., Any]
    write: Callable[..., Any]
    pending: Callable[..., Any]

    @classmethod
    def _create(cls, incoming: ssl.MemoryBIO, *arguments: Any, **named: Any) -> "_Direct":
        made: _Direct = super()._create(incoming, *arguments, **named)  # type: ignore[misc]
        binding: Any = made._sslobj  # type: ignore[attr-defined]
        read, pending = binding.read, binding.pending

        def read_some(*arguments: Any) -> Any:
            if incoming.pending or incoming.eof or pending():
                return read(*arguments)
            raise ssl.SSLWantReadError

        # As SSLObject's. A loop reads until nothing is left, which OpenSSL takes longer to say than a message.
        made.read = read_some
        made.write, made.pending = binding.write, pending
        return made


@lru_cache(maxsize=2)  # it takes 2 ms of the event loop, a third of what a connection does
def client_context(identity: Identity) -> ssl.SSLContext:
    """For calls: shows `identity`, and believes its CA only; one for all of them. Raises ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _configure(context, identity)
    return context


def server_context(current: Callable[[], Identity]) -> ssl.SSLContext:
    """For calls that come in, of those only who have a certificate of the same CA.

    `current` is asked at each handshake, so that a renewed certificate is used. Raises ssl.SSLError.
    """
    newest: list[tuple[Identity, ssl.SSLContext]] = []

    def choose(handshake: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        identity = current()
        if newest[0][0] is not identity:
            newest[0] = identity, _server(identity)
        handshake.context = newest[0][1]

    identity = current()
    context = _server(identity)
    newest.append((identity, context))
    context.sni_callback = choose  # called at each handshake, with or without a name
    return context


def _server(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    _configure(context, identity)
    return context


def _configure(context: ssl.SSLContext, identity: Identity) -> None:
    context.sslobject_class = _Direct
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=identity.ca_pem.decode("ascii"))
    with _file(identity.key_pem) as key, _file(identity.chain_pem) as chain:
        context.load_cert_chain(chain, key)


@contextmanager
def _file(data: bytes) -> Iterator[str]:
    """A path to `data` for as long as it is needed: OpenSSL's binding takes keys from files only."""
    if hasattr(os, "memfd_create"):  # a key that never reaches a disk
        number = os.memfd_create("pem")
        try:
            os.write(number, data)
            yield f"/proc/self/fd/{number}"
        finally:
            os.close(number)
        return
    with tempfile.TemporaryDirectory() as folder:  # only this user may look into it
        path = Path(folder) / "pem"
        path.write_bytes(data)
        yield str(path)
