"""Which nodes hold no experts because a person wants it so, in the store.

`moehive node drain` asks from a process of its own and waits for the answer; the coordinator looks for new requests
every second. A drain that was accepted lasts, over restarts too, until `moehive node readmit` (records.readmit_node).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..types import CoordinatorError, NodeName
from .store import Store


@dataclass(frozen=True, slots=True)
class Drain:
    """What has become of a request; neither: the coordinator has not looked at it yet."""

    accepted: bool = False
    refusal: str = ""  # why it can't be done, one sentence


def ask_drain(store: Store, name: str) -> None:
    """Asks for a node to be drained; asking again does no harm. Raises CoordinatorError when there is none."""
    with store.transaction() as db:
        known = db.execute("SELECT 1 FROM nodes WHERE name = ? AND revoked IS NULL", (name,)).fetchone()
        if known is None:
            raise CoordinatorError(f"No node named {name[:64]!r} has joined this cluster.")
        db.execute(
            "INSERT INTO drains (name, since) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET refusal = ''",
            (name, store.clock()),
        )


def accept_drain(store: Store, name: NodeName) -> None:
    """The node is drained from now on, unless the request was withdrawn."""
    with store.transaction() as db:
        db.execute("UPDATE drains SET accepted = 1 WHERE name = ?", (name,))


def refuse_drain(store: Store, name: NodeName, sentence: str) -> None:
    """The request can't be met now; it has to be made anew."""
    with store.transaction() as db:
        db.execute("UPDATE drains SET refusal = ? WHERE name = ?", (sentence, name))


def drains(store: Store) -> Mapping[NodeName, Drain]:
    """All requests."""
    with store.reading() as db:
        return {
            NodeName(name): Drain(bool(accepted), refusal)
            for name, accepted, refusal in db.execute("SELECT name, accepted, refusal FROM drains ORDER BY since")
        }
