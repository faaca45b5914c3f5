"""Join tokens in the store: made, and used once.

Only a hash of the secret is kept. The secret is 16 random bytes, so a plain hash can't be searched for.
"""

import hashlib
import hmac
import secrets
import sqlite3

from moehive.proto.join_token import SECRET_BYTES, JoinToken

from ..types import CoordinatorError
from .store import Store

TTL_SECONDS = 3600.0  # how long a token is good for when nothing else is asked
KEPT_SECONDS = 30 * 86_400.0  # how long a dead token is remembered, so that its error can say why


class TokenRefused(CoordinatorError):
    """The token is wrong, used or expired."""


def create_token(store: Store, address: str, fingerprint: str, ttl: float = TTL_SECONDS) -> JoinToken:
    """A new token, good for one node within `ttl` seconds; `address` is host:port of the join service."""
    if ttl <= 0:
        raise CoordinatorError("A token's life must be longer than 0 seconds.")
    token = JoinToken(address, secrets.token_bytes(SECRET_BYTES), fingerprint)
    digest = _hash(token.secret_text)
    now = store.clock()
    with store.transaction() as db:
        db.execute("DELETE FROM tokens WHERE expires < ?", (now - KEPT_SECONDS,))
        db.execute(
            "INSERT INTO tokens (id, hash, created, expires) VALUES (?, ?, ?, ?)",
            (digest[:8], digest, now, now + ttl),
        )
    return token


def use_token(db: sqlite3.Connection, secret_text: str, node: str, now: float) -> None:
    """Marks the token as used by `node`, within the caller's transaction. Raises TokenRefused."""
    digest = _hash(secret_text)
    row = db.execute("SELECT hash, expires, used_by FROM tokens WHERE id = ?", (digest[:8],)).fetchone()
    if row is None or not hmac.compare_digest(row[0], digest):
        raise TokenRefused("This cluster knows no such join token; make one with `moehive token` on the coordinator.")
    if row[2] is not None:
        raise TokenRefused(f"The join token was used before, by node {row[2]!r}; make another with `moehive token`.")
    if now >= row[1]:
        raise TokenRefused("The join token has expired; make a new one with `moehive token` on the coordinator.")
    db.execute("UPDATE tokens SET used = ?, used_by = ? WHERE id = ?", (now, node, digest[:8]))


def _hash(secret_text: str) -> bytes:
    return hashlib.sha256(secret_text.encode()).digest()
