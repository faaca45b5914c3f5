"""The database: what is in it after a restart, and one sentence for each way in which it can fail."""

import sqlite3
import subprocess
import sys

import pytest

from moehive.coordinator.cluster import keys, records
from moehive.coordinator.cluster.store import Store
from moehive.coordinator.cluster.tokens import TokenRefused, create_token, use_token
from moehive.coordinator.types import CoordinatorError, Pins, Plan
from moehive.proto.join_token import parse


@pytest.fixture
def path(tmp_path):
    return tmp_path / "coordinator.sqlite"


@pytest.fixture
def store(path):
    store = Store(path)
    yield store
    store.close()


def test_everything_is_there_after_a_restart(path, manifest):
    store = Store(path)
    token = create_token(store, "host:1", "ab" * 32)
    _, key = keys.create_key(store, "laptop")
    owners = tuple(tuple((f"n{e % 3}",) for e in range(layer.experts)) for layer in manifest.layers)
    pins = {"n1": Pins(((1,), *((),) * (len(owners) - 1)), ((),) * len(owners))}
    plan = Plan(4, owners, pins)
    records.claim_epoch(store, 4)
    records.save_plan(store, manifest.fingerprint, plan, ["n0", "n1", "n2", "idle"])
    records.save_join_address(store, "host:1")
    store.close()
    store = Store(path)
    assert records.last_epoch(store) == 4
    assert records.load_plan(store, manifest.fingerprint, manifest.layers) == (
        plan,
        frozenset({"n0", "n1", "n2", "idle"}),
    )
    assert records.load_plan(store, "cd" * 32, manifest.layers) is None
    assert records.load_plan(store, manifest.fingerprint, manifest.layers[:1]) is None
    assert records.load_join_address(store) == "host:1"
    assert keys.check_key(store, key) == "laptop"
    with store.transaction() as db:
        use_token(db, parse(str(token)).secret_text, "attic", store.clock())
    store.close()


def test_epochs_only_grow(store):
    records.claim_epoch(store, 1)
    records.claim_epoch(store, 5)
    for old in (5, 4):
        with pytest.raises(CoordinatorError, match="Another coordinator uses"):
            records.claim_epoch(store, old)
    assert records.last_epoch(store) == 5


def test_no_secret_is_in_the_file(path):
    store = Store(path)
    token = create_token(store, "host:1", "ab" * 32)
    _, key = keys.create_key(store, "laptop")
    store.close()
    content = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"laptop" in content
    for secret in (token.secret, token.secret_text.encode(), key.encode(), key[4:].encode()):
        assert secret not in content
    assert path.stat().st_mode & 0o077 == 0


def test_a_transaction_that_fails_leaves_nothing(store):
    token = create_token(store, "host:1", "ab" * 32)
    with pytest.raises(KeyError):
        with store.transaction() as db:
            use_token(db, token.secret_text, "attic", store.clock())
            raise KeyError
    with store.transaction() as db:
        use_token(db, token.secret_text, "attic", store.clock())
    with pytest.raises(TokenRefused, match="used before"):
        with store.transaction() as db:
            use_token(db, token.secret_text, "cellar", store.clock())


def test_a_token_needs_a_life(store):
    with pytest.raises(CoordinatorError, match="longer than 0"):
        create_token(store, "host:1", "ab" * 32, ttl=0)


def test_a_dead_token_is_forgotten_in_the_end(path):
    now = 1000.0
    store = Store(path, lambda: now)
    old = create_token(store, "host:1", "ab" * 32, ttl=10)
    now += 40 * 86_400
    create_token(store, "host:1", "ab" * 32)
    with pytest.raises(TokenRefused, match="knows no such"), store.transaction() as db:
        use_token(db, old.secret_text, "attic", now)
    store.close()


def test_keys(store):
    first, key = keys.create_key(store, "laptop")
    second, other = keys.create_key(store, "phone")
    assert [(k.id, k.name, k.revoked) for k in keys.list_keys(store)] in (
        [(first, "laptop", None), (second, "phone", None)],
        [(second, "phone", None), (first, "laptop", None)],  # made in the same instant
    )
    assert keys.check_key(store, key) == "laptop"
    for wrong in ("", "x", key[:-1], key + "x", first, "\ud800"):
        assert keys.check_key(store, wrong) is None
    keys.revoke_key(store, first)
    assert keys.check_key(store, key) is None
    assert keys.check_key(store, other) == "phone"
    with pytest.raises(CoordinatorError, match="no API key 'nope'"):
        keys.revoke_key(store, "nope")
    with pytest.raises(CoordinatorError, match="1 to 64"):
        keys.create_key(store, "")


def test_another_process_may_make_a_token_meanwhile(store, path):
    script = (
        "import sys; from pathlib import Path; from moehive.coordinator.cluster.store import Store; "
        "from moehive.coordinator.cluster.tokens import create_token; "
        "print(create_token(Store(Path(sys.argv[1])), 'host:1', 'ab' * 32))"
    )
    word = subprocess.run([sys.executable, "-c", script, path], check=True, capture_output=True, text=True).stdout
    with store.transaction() as db:
        use_token(db, parse(word).secret_text, "attic", store.clock())


def test_a_newer_schema_is_one_sentence(path):
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(CoordinatorError, match="another version of moehive"):
        Store(path)


def test_what_is_not_our_database_is_one_sentence(path, tmp_path):
    path.write_bytes(b"This is a letter to a friend. " * 100)
    with pytest.raises(CoordinatorError, match="is not a database"):
        Store(path)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(CoordinatorError, match="another program's"):
        Store(other)
    with pytest.raises(CoordinatorError, match="can't be opened"):
        Store(tmp_path / "nowhere" / "x.sqlite")
    with pytest.raises(CoordinatorError, match="can't be opened"):
        Store(tmp_path)


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(store):
    """SQLite's own page limit gives the error that a full disk gives."""
    token = create_token(store, "host:1", "ab" * 32)
    with store.reading() as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(CoordinatorError, match="is full; free some space"):
        for _ in range(1000):
            keys.create_key(store, "n" * 64)
    with store.reading() as db:
        db.execute(f"PRAGMA max_page_count={pages + 100}")
    keys.create_key(store, "after")
    with store.transaction() as db:
        use_token(db, token.secret_text, "attic", store.clock())


def test_a_database_that_stays_locked_is_one_sentence(store, path, monkeypatch):
    with store.reading() as db:
        db.execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(CoordinatorError, match="locked; stop it"):
        keys.create_key(store, "laptop")
    other.close()
