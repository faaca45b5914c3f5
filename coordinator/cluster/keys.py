"""API keys of clients: made, listed, revoked and checked. Only a hash of each is kept."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from ..types import CoordinatorError
from .store import Store

PREFIX = "mhk-"
MAX_NAME = 64  # characters


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key; times are Unix seconds."""

    id: str
    name: str
    created: float
    revoked: float | None


def create_key(store: Store, name: str) -> tuple[str, str]:
    """Makes a key; returns its id and the key itself, which can't be shown again."""
    if not 1 <= len(name) <= MAX_NAME:
        raise CoordinatorError(f"A key's name must have 1 to {MAX_NAME} characters.")
    key = PREFIX + secrets.token_urlsafe(24)
    digest = _hash(key)
    with store.transaction() as db:
        db.execute(
            "INSERT INTO api_keys (id, name, hash, created) VALUES (?, ?, ?, ?)",
            (_id(digest), name, digest, store.clock()),
        )
    return _id(digest), key


def list_keys(store: Store) -> list[ApiKey]:
    """All keys, the oldest first, revoked ones too."""
    with store.reading() as db:
        rows = db.execute("SELECT id, name, created, revoked FROM api_keys ORDER BY created, id").fetchall()
    return [ApiKey(*row) for row in rows]


def revoke_key(store: Store, key_id: str) -> None:
    """Makes a key useless from now on. Raises CoordinatorError when there is none of that id."""
    with store.transaction() as db:
        changed = db.execute(
            "UPDATE api_keys SET revoked = coalesce(revoked, ?) WHERE id = ?", (store.clock(), key_id)
        ).rowcount
    if not changed:
        raise CoordinatorError(f"There is no API key {key_id[:64]!r}; `moehive key list` shows those that there are.")


def check_key(store: Store, key: str) -> str | None:
    """The name of the key when it is one of ours and not revoked, else None."""
    digest = _hash(key)
    with store.reading() as db:
        row = db.execute("SELECT name, hash, revoked FROM api_keys WHERE id = ?", (_id(digest),)).fetchone()
    if row is None or not hmac.compare_digest(row[1], digest) or row[2] is not None:
        return None
    name: str = row[0]
    return name


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _id(digest: bytes) -> str:
    return digest[:4].hex()
