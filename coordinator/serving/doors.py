"""Who may come in: on loopback anybody, elsewhere only over TLS with an API key."""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..types import CoordinatorError

CheckKey = Callable[[str], bool]  # is this API key one of ours? Must take the same time for a wrong key.


@dataclass(frozen=True, slots=True)
class Tls:
    """The certificate that a door shows, then its CA's, and the private key; PEM files."""

    chain_file: Path
    key_file: Path


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_may_open(host: str, tls: Tls | None, check_key: CheckKey | None) -> None:
    """Raises CoordinatorError for a door that others could reach without TLS or without a key."""
    if is_loopback(host) or (tls is not None and check_key is not None):
        return
    missing = [name for name, there in (("TLS", tls), ("API keys", check_key)) if there is None]
    raise CoordinatorError(
        f"{host} can be reached from other machines, and {' and '.join(missing)} are missing: run `moehive init` for "
        "certificates and `moehive key new NAME` for a key, or listen on 127.0.0.1."
    )


def bearer_key(authorization: str | None) -> str:
    """The key in an `authorization: Bearer KEY` header; empty when there's none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
