"""The hash by which an expert is known, on disk and on its way: BLAKE3, 32 bytes.

Every byte of a model is hashed when it is converted, sent, received and read again. BLAKE3 takes a quarter of a
second of a processor for a gigabyte (4.1 GB/s with AVX-512), SHA-256 without instructions of its own ten times that.
"""

from typing import Any, Protocol

from blake3 import blake3

DIGEST_BYTES = 32


class Digest(Protocol):
    """A hash in work; `update` lets other threads run."""

    def update(self, data: Any, /) -> object:
        """Adds bytes (anything with a buffer)."""

    def digest(self) -> bytes:
        """Of all bytes so far."""

    def hexdigest(self) -> str:
        """The same, hexadecimal."""


def new_digest() -> Digest:
    """The hash of no bytes yet."""
    return blake3()


def digest_of(data: Any) -> bytes:
    """The 32 bytes by which an expert with these bytes (anything with a buffer) is known."""
    return blake3(data).digest()
