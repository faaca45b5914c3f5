"""What the cluster is: frozen data, which events (events.py) change by one pure function (transitions.py).

At most two plans are alive: the *active* one, by which requests are dispatched, and a *pending* one, whose slices
the nodes load meanwhile. The pending plan becomes active when every node that it gives experts to has reported
ready for its epoch and is still there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from ..types import NodeName, Plan


class Phase(Enum):
    """A node's state as a person is shown it."""

    JOINING = "joining"  # here, nothing assigned yet
    LOADING = "loading"  # fetching or reading its slice
    READY = "ready"
    LEAVING = "leaving"  # was asked to stop
    DRAINING = "draining"  # a person wants it to hold nothing; the others are loading its experts
    DRAINED = "drained"  # it holds nothing until a person readmits it
    AWAY = "away"  # no control stream
    QUARANTINED = "quarantined"  # it answered what can't be true; only a person lets it in again


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a node says of itself when it arrives."""

    address: str  # host:port of its Experts service; empty for the coordinator's own memory
    ram_bytes: int  # that it gives to experts
    read_bandwidth: float = 0.0  # bytes a second, measured by the node
    threads: int = 1
    software: str = ""
    disk_bytes: int = 0  # that it gives to experts beyond those
    vram_bytes: int = 0  # of a GPU, for experts that lie in the others too
    # Of a number and a weight, measured by the node; 0: not measured. In q8_0 with many tokens, in q4_k with one.
    products_per_s: float = 0.0
    token_products_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TierFigures:
    """Where the experts of a node with several tiers lie, and how often the fast ones served; since its start."""

    ram_bytes: int  # of experts in RAM now
    disk_bytes: int
    vram_bytes: int
    lookups: int  # experts asked for
    in_ram: int  # of those: were in RAM
    foreseen: int  # of those: only because they were fetched ahead
    disk_read_bytes: int
    disk_bandwidth: float  # bytes a second, measured; 0: not yet


@dataclass(frozen=True, slots=True)
class Figures:
    """A node's last heartbeat; counters are since its start."""

    experts_held: int = 0
    bytes_held: int = 0
    calls: int = 0
    expert_calls: int = 0
    compute_ns: int = 0
    resident_bytes: int = 0
    load: float = 0.0
    tiers: TierFigures | None = None  # of a node that has others than RAM


@dataclass(frozen=True, slots=True)
class Node:
    """One node. `assigned` and `ready` are epochs whose slice it was told to hold, and reported to hold."""

    name: NodeName
    capacity: Capacity | None = None  # None: known from a stored plan only, not seen since the start
    present: bool = False
    leaving: bool = False  # was asked to stop
    drained: bool = False  # by a person: it gets no experts until it is readmitted
    assigned: frozenset[int] = frozenset()
    ready: frozenset[int] = frozenset()
    bytes_done: int = 0  # of the slice being loaded
    bytes_total: int = 0
    problem: str = ""  # why its slice could not be loaded
    quarantine: str = ""  # why it is shut out, one sentence
    figures: Figures = field(default_factory=Figures)

    @property
    def loads(self) -> bool:
        """Whether it was told to hold a slice that it does not hold yet; it may serve another one meanwhile."""
        return bool(self.assigned - self.ready)

    @property
    def stays(self) -> bool:
        """Whether the next plan may count on it, if it is here."""
        return not self.leaving and not self.drained


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The whole of it. `members` are the nodes whose memory the latest plan counted on, with experts or without."""

    nodes: Mapping[NodeName, Node] = field(default_factory=lambda: MappingProxyType({}))
    active: Plan | None = None
    active_owners: frozenset[NodeName] = frozenset()
    pending: Plan | None = None
    pending_owners: frozenset[NodeName] = frozenset()
    members: frozenset[NodeName] = frozenset()
    epoch: int = 0  # of the latest plan, active or pending
    holders: frozenset[NodeName] = frozenset()  # those that are here and hold their slice of the active plan
    missing: tuple[NodeName, ...] = ()  # the others without which some expert can be asked of nobody, by name

    @property
    def ready(self) -> bool:
        """Whether every expert has a node that is there."""
        return self.active is not None and not self.missing

    def holds(self, name: NodeName, epoch: int) -> bool:
        """Whether a node is here and has reported ready for `epoch`."""
        node = self.nodes[name]
        return node.present and epoch in node.ready

    def phase(self, name: NodeName) -> Phase:
        """A node's state in one word."""
        node = self.nodes[name]
        if node.quarantine:
            return Phase.QUARANTINED
        if not node.present:
            return Phase.AWAY
        if node.leaving:
            return Phase.LEAVING
        if node.drained:
            needed = name in self.active_owners or name in self.pending_owners
            return Phase.DRAINING if needed or node.figures.experts_held else Phase.DRAINED
        if self.active is not None and self.active.epoch in node.ready:
            return Phase.READY  # it serves, even while it loads the pending plan's slice
        if node.loads:
            return Phase.LOADING
        return Phase.READY if node.ready else Phase.JOINING
