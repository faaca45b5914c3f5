"""What the planner knows of a cluster: plain data, and the file that `moehive plan --cluster` reads.

A *place* is memory that computes: a node, or one tier of it (a GPU's memory and the RAM beside it are two places
behind one round trip). All figures are what nodes measured.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..types import CoordinatorError

MAX_NODES = 64  # and places: a replica set is the bits of one word
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Tier:
    """One memory of a node."""

    mem_bytes: int
    bw_Bps: float  # bytes a second at which experts there are computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node. The coordinator's own memory is a node with `rtt_s` and `msg_s` of 0."""

    name: str
    rtt_s: float  # seconds from sending a layer's request to its reply, without any work
    msg_s: float = 0.0  # seconds of handling one message at both ends
    token_s: float = 0.0  # seconds on the wire of one token's hidden states, there and back
    tiers: tuple[Tier, ...]
    reserve_bytes: int = 0  # stays free, of the last tiers first
    excluded: bool = False  # gets nothing
    pinned: frozenset[tuple[int, int]] = frozenset()  # (layer, expert) that it must hold, in its first tier


@dataclass(frozen=True, slots=True)
class Place:
    """Where experts lie and are computed."""

    node: int  # its index in the cluster
    tier: int
    mem_bytes: int  # that experts may take
    bw_Bps: float


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert that each token of each layer is sent to; computed by the coordinator unless a node is faster."""

    nbytes: int
    bw_Bps: float  # at which the coordinator reads it


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes in the caller's order, and what one expert of each layer weighs."""

    nodes: tuple[Node, ...]
    expert_bytes: tuple[int, ...]  # of each layer, or one number for all
    shared: SharedExpert | None = None
    places: tuple[Place, ...] = field(init=False)  # ordered by what they are, not by where they stand in `nodes`

    def __post_init__(self) -> None:
        """Raises CoordinatorError."""
        if not self.nodes:
            raise CoordinatorError("A cluster needs at least one node.")
        names = [node.name for node in self.nodes]
        if len(set(names)) != len(names):
            raise CoordinatorError("Two nodes of the cluster have the same name; give each its own.")
        found = []
        for index, node in enumerate(self.nodes):
            free = [0 if node.excluded else tier.mem_bytes for tier in node.tiers]
            keep = node.reserve_bytes
            for tier in reversed(range(len(free))):
                taken = min(keep, free[tier])
                free[tier] -= taken
                keep -= taken
            found += [Place(index, t, free[t], tier.bw_Bps) for t, tier in enumerate(node.tiers)]
        if len(found) > MAX_NODES:
            raise CoordinatorError(f"The planner knows up to {MAX_NODES} nodes and tiers, not {len(found)}.")
        found.sort(key=lambda p: (-p.bw_Bps, self.nodes[p.node].rtt_s, -p.mem_bytes, self.nodes[p.node].name, p.tier))
        object.__setattr__(self, "places", tuple(found))

    def bytes_of(self, layer: int) -> int:
        """Bytes of one expert of a layer."""
        return self.expert_bytes[layer if len(self.expert_bytes) > 1 else 0]


def read_cluster(path: Path) -> Cluster:
    """Reads `{"nodes": [{"name", "mem_bytes", "bw_Bps", "rtt_s", "msg_s"}], "expert_bytes"}`.

    `expert_bytes` is a number, or a list with one for each layer. A node may also have `token_s`, `reserve_bytes`,
    `excluded`, `tiers` ([{"mem_bytes", "bw_Bps"}] instead of its own two) and `pinned` ([[layer, expert]]); the
    cluster may have `shared` ({"bytes", "bw_Bps"}). Raises CoordinatorError.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CoordinatorError(f"{path} is too large for a description of a cluster.")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CoordinatorError(f"{path} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CoordinatorError(f"{path} is not valid JSON: {error}.") from error
    try:
        return parse_cluster(raw)
    except CoordinatorError as error:
        raise CoordinatorError(f"{path}: {error}") from None


def parse_cluster(raw: Any) -> Cluster:
    """A cluster of the file's JSON. Raises CoordinatorError."""
    table = _table(raw, "the cluster", {"nodes", "expert_bytes", "shared"})
    nodes = table.get("nodes")
    if not isinstance(nodes, list):
        raise CoordinatorError('"nodes" must be a list of nodes.')
    sizes = table.get("expert_bytes")
    sizes = sizes if isinstance(sizes, list) else [sizes]
    if not 1 <= len(sizes) <= 1024:
        raise CoordinatorError('"expert_bytes" must be a number, or a list with one for each layer.')
    shared = None
    if table.get("shared") is not None:
        part = _table(table["shared"], '"shared"', {"bytes", "bw_Bps"})
        shared = SharedExpert(
            _count(part, "bytes", '"shared"', 1), _number(part, "bw_Bps", '"shared"', positive=True)
        )
    return Cluster(
        tuple(_node(node, index) for index, node in enumerate(nodes)),
        tuple(_count({"expert_bytes": size}, "expert_bytes", "the cluster", 1) for size in sizes),
        shared,
    )


def _node(raw: Any, index: int) -> Node:
    where = f"node {index}"
    table = _table(
        raw,
        where,
        {"name", "mem_bytes", "bw_Bps", "rtt_s", "msg_s", "token_s", "reserve_bytes", "excluded", "tiers", "pinned"},
    )
    name = table.get("name", f"node-{index}")
    if not isinstance(name, str) or not 1 <= len(name) <= 64:
        raise CoordinatorError(f'The "name" of {where} must be text of 1 to 64 characters.')
    tiers = table.get("tiers")
    if tiers is None:
        tiers = [{key: table[key] for key in ("mem_bytes", "bw_Bps") if key in table}]
    if not isinstance(tiers, list) or not tiers:
        raise CoordinatorError(f'The "tiers" of {where} must be a list.')
    parts = [_table(tier, f"a tier of {where}", {"mem_bytes", "bw_Bps"}) for tier in tiers]
    pins = table.get("pinned", [])
    if not isinstance(pins, list) or not all(
        isinstance(pin, list) and len(pin) == 2 and all(type(x) is int and 0 <= x < 1 << 16 for x in pin)
        for pin in pins
    ):
        raise CoordinatorError(f'The "pinned" of {where} must be a list of [layer, expert].')
    excluded = table.get("excluded", False)
    if not isinstance(excluded, bool):
        raise CoordinatorError(f'"excluded" of {where} must be true or false.')
    return Node(
        name=name,
        rtt_s=_number(table, "rtt_s", where, default=0.0),
        msg_s=_number(table, "msg_s", where, default=0.0),
        token_s=_number(table, "token_s", where, default=0.0),
        tiers=tuple(
            Tier(_count(part, "mem_bytes", where, 0), _number(part, "bw_Bps", where, positive=True)) for part in parts
        ),
        reserve_bytes=_count(table, "reserve_bytes", where, 0) if "reserve_bytes" in table else 0,
        excluded=excluded,
        pinned=frozenset((layer, expert) for layer, expert in pins),
    )


def _table(raw: Any, what: str, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise CoordinatorError(f"{what} must be a JSON object.")
    if unknown := sorted(raw.keys() - known):
        raise CoordinatorError(f"{what} has an unknown {unknown[0][:40]!r}; known are {', '.join(sorted(known))}.")
    return raw


def _number(
    table: Mapping[str, Any], key: str, where: str, positive: bool = False, default: float | None = None
) -> float:
    value = table.get(key, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value < 1e18
        or (positive and not value)
    ):
        raise CoordinatorError(f'"{key}" of {where} must be a number {"above" if positive else "of at least"} 0.')
    return float(value)


def _count(table: Mapping[str, Any], key: str, where: str, least: int) -> int:
    value = table.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value < 1 << 62:
        raise CoordinatorError(f'"{key}" of {where} must be a whole number of bytes, {least} or more.')
    return value
