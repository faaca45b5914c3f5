"""A join token: one word that a person copies from the coordinator to a new node.

It holds where to join, which cluster must answer there (the fingerprint of its CA) and a secret that is good for
one use. Layout of the bytes behind `mh1.`, base64url without padding:

    secret        16 bytes
    fingerprint   32 bytes, SHA-256 of the CA's certificate (DER)
    address       host:port, UTF-8, 3 to 300 bytes
    checksum       4 bytes, big-endian CRC-32 of all before, so that a cut or mistyped token is told from a wrong one
"""

import base64
import binascii
import zlib
from dataclasses import dataclass

from .bounds import BoundsError, host_port

PREFIX = "mh1."
SECRET_BYTES = 16
FINGERPRINT_BYTES = 32
MAX_CHARACTERS = 600


class TokenError(ValueError):
    """A word that is not a join token; its text is one sentence for a person."""


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What a join token says; `fingerprint` is 64 hexadecimal digits."""

    address: str  # host:port of the coordinator's join service
    secret: bytes  # 16 random bytes
    fingerprint: str

    @property
    def secret_text(self) -> str:
        """The secret as `JoinRequest.token_secret` carries it."""
        return base64.urlsafe_b64encode(self.secret).rstrip(b"=").decode("ascii")

    def __str__(self) -> str:
        """The token as one word."""
        body = self.secret + bytes.fromhex(self.fingerprint) + self.address.encode()
        body += zlib.crc32(body).to_bytes(4, "big")
        return PREFIX + base64.urlsafe_b64encode(body).rstrip(b"=").decode("ascii")


def parse(word: str) -> JoinToken:
    """Reads a join token; white space around it is ignored. Raises TokenError."""
    word = word.strip()
    if not word.startswith(PREFIX) or len(word) > MAX_CHARACTERS:
        raise TokenError(
            f"This is not a join token: one starts with {PREFIX!r} and is a single word. "
            "Make one with `moehive token` on the coordinator."
        )
    text = word[len(PREFIX) :]
    try:
        body = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        body = b""
    checked = body[:-4]
    if len(checked) <= SECRET_BYTES + FINGERPRINT_BYTES or zlib.crc32(checked) != int.from_bytes(body[-4:], "big"):
        raise TokenError("The join token was cut off or changed on its way; copy the whole word again.")
    secret, rest = checked[:SECRET_BYTES], checked[SECRET_BYTES:]
    fingerprint, address = rest[:FINGERPRINT_BYTES].hex(), rest[FINGERPRINT_BYTES:]
    try:
        text = address.decode()
        host_port(text)
    except (UnicodeDecodeError, BoundsError) as error:
        raise TokenError(f"The join token names no usable address ({address[:64]!r}); make a new one.") from error
    return JoinToken(text, secret, fingerprint)
