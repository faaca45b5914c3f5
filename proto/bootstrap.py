"""A node's first contact: getting the cluster's CA from a coordinator that it knows only by a fingerprint.

The join token carries the SHA-256 of the CA's certificate. The coordinator's join service presents its certificate
and then the CA's, so one handshake shows the CA; only bytes with the right hash are believed, and every connection
after this one is verified against them in the ordinary way.
"""

import hashlib
import socket
import ssl

import grpc
import grpc.aio

from . import channel
from .bounds import join_host_port

TIMEOUT_SECONDS = 10.0


class BootstrapError(Exception):
    """The coordinator can't be reached or is not the one that the token names; one sentence for a person."""


def fetch_ca(host: str, port: int, fingerprint: str, timeout: float = TIMEOUT_SECONDS) -> bytes:
    """The CA's certificate (PEM) whose DER has the SHA-256 `fingerprint` (64 hexadecimal digits).

    Blocks for up to `timeout` seconds. Raises BootstrapError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is known yet but the fingerprint, checked below
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    where = join_host_port(host, port)
    try:
        with socket.create_connection((host, port), timeout) as plain:
            with context.wrap_socket(plain, server_hostname=channel.COORDINATOR_NAME) as secured:
                chain = _presented_chain(secured)
    except ssl.SSLError as error:
        raise BootstrapError(
            f"No coordinator answers at {where}, but a program of another kind; make a token with the coordinator's "
            "join port (7702, unless it was started with another --join-port)."
        ) from error
    except OSError as error:  # time-outs too
        raise BootstrapError(
            f"No coordinator answers at {where} ({error.strerror or error}); check that it runs, that the address in "
            "the token is the one that this machine can reach, and that no firewall is between."
        ) from error
    for der in chain:
        if hashlib.sha256(der).hexdigest() == fingerprint:
            return ssl.DER_cert_to_PEM_cert(der).encode("ascii")
    raise BootstrapError(
        f"A different cluster answers at {where}: none of its certificates has the fingerprint in the join token. "
        "Make a new token with `moehive token` on the coordinator that this node should join."
    )


def _presented_chain(secured: ssl.SSLSocket) -> list[bytes]:
    """The certificates that the other side sent, as DER."""
    if hasattr(secured, "get_unverified_chain"):  # Python 3.13
        return list(secured.get_unverified_chain())
    # Python 3.11 and 3.12 have it on the private object only.
    presented = secured._sslobj.get_unverified_chain() or ()  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in presented]


def open_join_channel(address: str, ca_pem: bytes) -> grpc.aio.Channel:
    """A channel to the join service at `address` (host:port), for a node that has no certificate yet."""
    credentials = grpc.ssl_channel_credentials(ca_pem)
    override = [("grpc.ssl_target_name_override", channel.COORDINATOR_NAME)]
    return grpc.aio.secure_channel(
        address, credentials, options=channel.options(channel.MAX_CONTROL_BYTES) + override
    )
