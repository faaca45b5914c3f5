"""What both sides show in a handshake and whom they believe, by the system's OpenSSL (cpp/tls.cc): mutual TLS 1.3.

Whom a certificate is for is a name in it, not an address.
"""

import ctypes
import socket
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from cryptography import x509

from ..channel import Identity
from ..native import library

MAX_CERTIFICATE_BYTES = 64 << 10


class TlsError(OSError):
    """TLS is not to be had; its text is one sentence."""


class OtherSide(NamedTuple):
    """Who is at a connection's other end, as far as the connection itself says."""

    host: str = ""  # its IP address
    names: tuple[str, ...] = ()  # the DNS names in its certificate; none without one
    certificate: bytes = b""  # DER


class Context:
    """An identity as OpenSSL has it, for the connections that this side begins, or answers."""

    def __init__(self, identity: Identity, *, server: bool) -> None:
        """Raises TlsError."""
        native = library()
        if not native.moehive_tls_there():
            raise TlsError("This system has no OpenSSL 3: install its package, libssl3 on Debian and Ubuntu.")
        why = ctypes.create_string_buffer(160)
        self.handle: int = native.moehive_tls_context(
            server, identity.key_pem, identity.chain_pem, identity.ca_pem, why
        )
        if not self.handle:
            raise TlsError(f"OpenSSL does not take a key or certificate: {why.value.decode('ascii', 'replace')}.")
        weakref.finalize(self, native.moehive_tls_context_end, self.handle)


def other_side(end: socket.socket, handle: int) -> OtherSide:
    """Of a connection whose handshake is done; `handle` of cpp/socket.h."""
    try:
        address = end.getpeername()
    except OSError:  # it is gone already
        return OtherSide()
    host = str(address[0]).removeprefix("::ffff:")  # IPv4 on a socket that takes both
    room = ctypes.create_string_buffer(MAX_CERTIFICATE_BYTES)
    size = library().moehive_socket_certificate(handle, room, len(room))
    if not 0 < size <= len(room):
        return OtherSide(host)
    certificate = room.raw[:size]
    return OtherSide(host, _names(certificate), certificate)


@lru_cache(maxsize=2)  # it takes 2 ms of the event loop, a third of what a connection does
def client_context(identity: Identity) -> Context:
    """For calls: shows `identity`, and believes its CA only; one for all of them. Raises TlsError."""
    return Context(identity, server=False)


def server_context(current: Callable[[], Identity]) -> Callable[[], Context]:
    """For calls that come in, of those only who have a certificate of the same CA.

    What it returns is asked at each handshake, and asks `current`, so that a renewed certificate is used. Raises
    TlsError.
    """
    identity = current()
    newest = identity, Context(identity, server=True)

    def context() -> Context:
        nonlocal newest
        identity = current()
        if newest[0] is not identity:
            newest = identity, Context(identity, server=True)
        return newest[1]

    return context


def _names(certificate: bytes) -> tuple[str, ...]:
    try:
        extensions = x509.load_der_x509_certificate(certificate).extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return ()
    return tuple(names.get_values_for_type(x509.DNSName))
