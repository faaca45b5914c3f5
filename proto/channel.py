"""Size limits and names of every internal channel; options and TLS credentials of those that are grpc.aio's.

Names, not addresses, are what certificates say: a caller checks that the other side is `coordinator` or the node
that it meant to reach, whatever address that has today.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

MAX_MESSAGE_BYTES = 80 << 20  # a chunk of hidden states (64 MiB), its routing and some room
MAX_CONTROL_BYTES = 8 << 20  # anything that carries no tensors
MAX_CLIENT_BYTES = 16 << 20  # a client's prompt or chat

COORDINATOR_NAME = "coordinator.moehive"  # in the coordinator's certificate


def node_dns_name(node: str) -> str:
    """The name in a node's certificate."""
    return f"{node}.node.moehive"


@dataclass(frozen=True, slots=True)
class Identity:
    """One side's private key, its certificate (then the CA's), and the CA that it trusts, if any; all PEM."""

    key_pem: bytes
    chain_pem: bytes
    ca_pem: bytes


class Authenticated(Protocol):
    """A call's context that knows who called: gRPC's own, and the wire's."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]] | None:
        """What is known of the caller."""


def options(max_bytes: int) -> list[tuple[str, int | str]]:
    """gRPC channel arguments: size limits, keepalive that notices a dead machine in about 15 s, no retries."""
    return [
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server
        ("grpc.enable_retries", 0),
        # Despite its name: how long one attempt to connect, TLS included, may take. Retries go by the two below it.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


def server_credentials(current: Callable[[], Identity]) -> grpc.ServerCredentials:
    """TLS credentials for a server whose callers need no certificate: nodes that join, clients of the public door.

    `current` is asked at each handshake, so a renewed certificate is used.
    """
    shown = current()

    def configuration() -> grpc.ServerCertificateConfiguration:
        roots = shown.ca_pem or None
        return grpc.ssl_server_certificate_configuration([(shown.key_pem, shown.chain_pem)], roots)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        # None: the same as before. To replace it is safe only while no other connection begins or ends: gRPC frees
        # what another handshake reads (a crash of servers that stopped while several nodes connected).
        nonlocal shown
        identity = current()
        if identity == shown:
            return None
        shown = identity
        return configuration()

    return grpc.dynamic_ssl_server_credentials(configuration(), renewed, require_client_authentication=False)


def peer_names(context: Authenticated) -> frozenset[str]:
    """The DNS names in the caller's certificate; empty on a channel without one."""
    names = (context.auth_context() or {}).get("x509_subject_alternative_name", ())
    return frozenset(name.decode("ascii", "replace") for name in names)


def bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Binds a server to host:port (0: any free one) and returns the port.

    Raises OSError with one sentence when the port is taken or the address is not this machine's.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            bound: int = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        bound = 0
        reason: BaseException | None = error
    else:
        reason = None
    if bound == 0:
        raise OSError(
            f"Cannot listen on {address}: the port is in use or the address is not this machine's. "
            "Stop the other program or choose another port."
        ) from reason
    return bound
