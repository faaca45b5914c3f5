"""The coordinator's SQLite database: what must survive a restart.

Join tokens and API keys (as hashes only), the nodes that were let in, shut out or drained, the epoch counter and the
plan in force for each model. WAL, and `synchronous=FULL`: what was committed is there after a power cut. Several
processes may use one database (`moehive token` while the coordinator runs).

This file is the connection, the schema and the errors; tokens.py, keys.py, drains.py and records.py hold the
statements.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..types import CoordinatorError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x4D4F4548  # "MOEH", so that another program's database is told apart
BUSY_SECONDS = 5.0  # how long a write waits for another process's

_SCHEMA = """
CREATE TABLE tokens (
    id BLOB PRIMARY KEY,        -- first 8 bytes of the hash: what it is looked up by
    hash BLOB NOT NULL,         -- SHA-256 of the secret
    created REAL NOT NULL,      -- Unix seconds, as all times here
    expires REAL NOT NULL,
    used REAL,                  -- when, and by which node; NULL: not yet
    used_by TEXT
) STRICT;
CREATE TABLE api_keys (
    id TEXT PRIMARY KEY,        -- what a person calls it by: first 8 hexadecimal digits of the hash
    name TEXT NOT NULL,
    hash BLOB NOT NULL,
    created REAL NOT NULL,
    revoked REAL
) STRICT;
CREATE TABLE nodes (
    name TEXT PRIMARY KEY,
    joined REAL NOT NULL,
    certificate_expires REAL NOT NULL,
    revoked REAL
) STRICT;
CREATE TABLE epochs (last INTEGER NOT NULL) STRICT;
INSERT INTO epochs VALUES (0);
CREATE TABLE addresses (
    name TEXT PRIMARY KEY,      -- "join": where nodes join, so that `moehive token` need not be told
    address TEXT NOT NULL       -- host:port
) STRICT;
CREATE TABLE plans (
    fingerprint TEXT PRIMARY KEY,  -- of the model
    plan BLOB NOT NULL             -- records.py, msgpack
) STRICT;
"""
# Made in databases of any age; another build of the same schema version does not look at them.
_LATER = """
CREATE TABLE IF NOT EXISTS quarantine (
    name TEXT PRIMARY KEY,      -- of a node that answered what can't be true
    since REAL NOT NULL,
    sentence TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS drains (
    name TEXT PRIMARY KEY,      -- of a node that shall hold no experts
    since REAL NOT NULL,
    accepted INTEGER NOT NULL DEFAULT 0,
    refusal TEXT NOT NULL DEFAULT ''
) STRICT;
"""


class Store:
    """One connection, used by any thread, one at a time."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Opens or makes the database at `path`; its folder must exist. Raises CoordinatorError."""
        self.path = path
        self.clock = clock  # Unix seconds
        self._lock = threading.RLock()
        with self._errors():
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                path.chmod(0o600)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.execute("PRAGMA foreign_keys=ON")
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Closes the connection; the database stays."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing; writers, of other processes too, come one after the other.

        Raises CoordinatorError when the database fails; what the block itself raises undoes its statements.
        """
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite has rolled back itself when the disk is full
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for reading. Raises CoordinatorError when the database fails."""
        with self._lock, self._errors():
            yield self._db

    def _prepare(self) -> None:
        with self.transaction() as db:
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            if tables == 0 and version == 0:
                _run(db, _SCHEMA)
                db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                application, version = APPLICATION_ID, SCHEMA_VERSION
            if (application, version) == (APPLICATION_ID, SCHEMA_VERSION):
                _run(db, _LATER)
        if application != APPLICATION_ID:
            raise CoordinatorError(f"{self.path} is another program's database; choose another state directory.")
        if version != SCHEMA_VERSION:
            raise CoordinatorError(
                f"{self.path} was written by another version of moehive (schema {version}, this build has "
                f"{SCHEMA_VERSION}); install that version or start with a new state directory."
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise CoordinatorError(self._sentence(error)) from error

    def _sentence(self, error: Exception) -> str:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the extended part
        known = {
            sqlite3.SQLITE_FULL: f"The disk that holds {self.path} is full; free some space and try again.",
            sqlite3.SQLITE_BUSY: f"Another process keeps {self.path} locked; stop it and try again.",
            sqlite3.SQLITE_NOTADB: f"{self.path} is not a database; move it away or choose another state directory.",
            sqlite3.SQLITE_CORRUPT: f"{self.path} is damaged; restore it from a copy or start with a new state "
            "directory.",
            sqlite3.SQLITE_CANTOPEN: f"{self.path} can't be opened; check that its folder exists and is yours.",
            sqlite3.SQLITE_READONLY: f"{self.path} can't be written; check who owns it and its folder.",
            sqlite3.SQLITE_IOERR: f"{self.path} can't be read or written ({error}); check the disk.",
        }
        return known.get(code, f"The database {self.path} failed: {error}.")


def _run(db: sqlite3.Connection, script: str) -> None:
    """All statements of a script, within the caller's transaction, which `executescript` would end."""
    for statement in script.split(";\n"):
        db.execute(statement)
