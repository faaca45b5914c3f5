"""Nodes, epochs and plans in the store."""

import sqlite3
from collections.abc import Sequence
from typing import Any

import msgpack

from moehive.kernels.geometry import LayerGeometry

from ..types import CoordinatorError, NodeName, Pins, Plan
from .store import Store

_SHUT_OUT = ("quarantine", "drains")  # tables of nodes that wait for `readmit_node`


def admit_node(db: sqlite3.Connection, name: str, certificate_expires: float, now: float) -> None:
    """Remembers a node that was given a certificate, within the caller's transaction; lifts a revocation."""
    db.execute(
        "INSERT INTO nodes (name, joined, certificate_expires) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
        "joined = excluded.joined, certificate_expires = excluded.certificate_expires, revoked = NULL",
        (name, now, certificate_expires),
    )


def renew_node(store: Store, name: str, certificate_expires: float) -> None:
    """Remembers that a node's certificate was renewed."""
    with store.transaction() as db:
        db.execute("UPDATE nodes SET certificate_expires = ? WHERE name = ?", (certificate_expires, name))


def revoke_node(store: Store, name: str) -> None:
    """Shuts a node out until it joins again with a new token. Raises CoordinatorError when there is none."""
    with store.transaction() as db:
        changed = db.execute("UPDATE nodes SET revoked = ? WHERE name = ?", (store.clock(), name)).rowcount
    if not changed:
        raise CoordinatorError(f"No node named {name[:64]!r} has joined this cluster.")


def is_revoked(store: Store, name: str) -> bool:
    """Whether a node of this name was shut out."""
    with store.reading() as db:
        return (
            db.execute("SELECT 1 FROM nodes WHERE name = ? AND revoked IS NOT NULL", (name,)).fetchone() is not None
        )


def revoked_nodes(store: Store) -> frozenset[NodeName]:
    """The nodes that were shut out until they join again."""
    with store.reading() as db:
        return frozenset(NodeName(name) for (name,) in db.execute("SELECT name FROM nodes WHERE revoked IS NOT NULL"))


def quarantine_node(store: Store, name: NodeName, sentence: str) -> None:
    """Shuts a node out until `readmit_node`; the first sentence stays."""
    with store.transaction() as db:
        db.execute("INSERT OR IGNORE INTO quarantine VALUES (?, ?, ?)", (name, store.clock(), sentence))


def readmit_node(store: Store, name: str) -> None:
    """Ends a node's quarantine and its drain. Raises CoordinatorError when it is in neither."""
    with store.transaction() as db:
        changed = [db.execute(f"DELETE FROM {table} WHERE name = ?", (name,)).rowcount for table in _SHUT_OUT]
    if not any(changed):
        raise CoordinatorError(f"No node named {name[:64]!r} is quarantined or drained.")


def quarantined_nodes(store: Store) -> dict[NodeName, str]:
    """The quarantined nodes, and why each is."""
    with store.reading() as db:
        return {NodeName(name): sentence for name, sentence in db.execute("SELECT name, sentence FROM quarantine")}


def save_join_address(store: Store, address: str) -> None:
    """Remembers host:port of the join service, for tokens."""
    with store.transaction() as db:
        db.execute("INSERT OR REPLACE INTO addresses (name, address) VALUES ('join', ?)", (address,))


def load_join_address(store: Store) -> str | None:
    """host:port of the join service; None when no coordinator has run on this store yet."""
    with store.reading() as db:
        row = db.execute("SELECT address FROM addresses WHERE name = 'join'").fetchone()
    return None if row is None else str(row[0])


def last_epoch(store: Store) -> int:
    """The largest epoch that a plan of this cluster has had."""
    with store.reading() as db:
        (last,) = db.execute("SELECT last FROM epochs").fetchone()
    return int(last)


def claim_epoch(store: Store, epoch: int) -> None:
    """Marks `epoch` as used, for good. Raises CoordinatorError when it, or a later one, was used before."""
    with store.transaction() as db:
        changed = db.execute("UPDATE epochs SET last = ? WHERE last < ?", (epoch, epoch)).rowcount
    if not changed:
        raise CoordinatorError(f"Another coordinator uses {store.path.parent} at the same time; stop one of them.")


def save_plan(store: Store, fingerprint: str, plan: Plan, members: Sequence[NodeName]) -> None:
    """Keeps the plan in force for a model, and the nodes whose memory it was made for."""
    names = sorted({name for layer in plan.owners for owners in layer for name in owners} | set(members))
    number = {name: index for index, name in enumerate(names)}
    packed = msgpack.packb(
        {
            "epoch": plan.epoch,
            "names": names,
            "members": sorted(members),
            "owners": [[[number[name] for name in owners] for owners in layer] for layer in plan.owners],
            "pins": [[number[name], *pins] for name, pins in plan.pins.items()],
        }
    )
    with store.transaction() as db:
        db.execute("INSERT OR REPLACE INTO plans (fingerprint, plan) VALUES (?, ?)", (fingerprint, packed))


def load_plan(
    store: Store, fingerprint: str, layers: Sequence[LayerGeometry]
) -> tuple[Plan, frozenset[NodeName]] | None:
    """The plan in force for a model and its members; None when there is none that fits the model's layers."""
    with store.reading() as db:
        row = db.execute("SELECT plan FROM plans WHERE fingerprint = ?", (fingerprint,)).fetchone()
    if row is None:
        return None
    packed: Any = msgpack.unpackb(row[0])
    names: list[NodeName] = packed["names"]
    owners = tuple(tuple(tuple(names[i] for i in nodes) for nodes in layer) for layer in packed["owners"])
    if [len(layer) for layer in owners] != [layer.experts for layer in layers]:
        return None
    pins = {
        names[number]: Pins(*(tuple(map(tuple, tier)) for tier in tiers))
        for number, *tiers in packed.get("pins", ())  # absent in what an earlier version wrote
    }
    return Plan(packed["epoch"], owners, pins), frozenset(packed["members"])
