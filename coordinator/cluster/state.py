"""What the cluster is, and how it changes: events and one pure function, `apply(state, event) -> state`.

There is no clock and no I/O here. Who decides which event happens is membership.py.

At most two plans are alive: the *active* one, by which requests are dispatched, and a *pending* one, whose slices
the nodes load meanwhile. The pending plan becomes active when every node that it gives experts to has reported
ready for its epoch and is still there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

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


@dataclass(frozen=True, slots=True)
class NodeArrived:
    """A node has opened its control stream; it is not believed to hold anything yet."""

    name: NodeName
    capacity: Capacity


@dataclass(frozen=True, slots=True)
class NodeAway:
    """A node's control stream has ended, or it was silent for too long."""

    name: NodeName


@dataclass(frozen=True, slots=True)
class NodeLeaving:
    """A node was asked to stop."""

    name: NodeName


@dataclass(frozen=True, slots=True)
class HeartbeatReceived:
    """A node's figures."""

    name: NodeName
    figures: Figures


@dataclass(frozen=True, slots=True)
class Planned:
    """A new plan is to be loaded; it replaces one that was still pending. Its epoch is larger than all before."""

    plan: Plan
    members: frozenset[NodeName]


@dataclass(frozen=True, slots=True)
class Resumed:
    """A plan that was in force before this coordinator started is so again; its nodes are yet to come."""

    plan: Plan
    members: frozenset[NodeName]


@dataclass(frozen=True, slots=True)
class NodeQuarantined:
    """A node has answered what can't be true: it is shut out until NodeReadmitted."""

    name: NodeName
    sentence: str


@dataclass(frozen=True, slots=True)
class NodeDrained:
    """A person wants a node to hold nothing until NodeReadmitted, whether it is here or not."""

    name: NodeName


@dataclass(frozen=True, slots=True)
class NodeReadmitted:
    """A person lets a quarantined node in again, or a drained one take part again."""

    name: NodeName


@dataclass(frozen=True, slots=True)
class SliceAssigned:
    """A node was told to hold its slice of the plan of `epoch`."""

    name: NodeName
    epoch: int


@dataclass(frozen=True, slots=True)
class SliceProgressed:
    """A node is loading its slice."""

    name: NodeName
    epoch: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class SliceHeld:
    """A node holds all of its slice of the plan of `epoch`."""

    name: NodeName
    epoch: int


@dataclass(frozen=True, slots=True)
class SliceNotHeld:
    """A node could not load its slice; it has to be assigned again."""

    name: NodeName
    epoch: int
    sentence: str


Event: TypeAlias = (
    NodeArrived
    | NodeAway
    | NodeLeaving
    | HeartbeatReceived
    | Planned
    | Resumed
    | NodeQuarantined
    | NodeDrained
    | NodeReadmitted
    | SliceAssigned
    | SliceProgressed
    | SliceHeld
    | SliceNotHeld
)


def apply(state: ClusterState, event: Event) -> ClusterState:
    """The state after `event`; the same object when nothing changes.

    An event that does not fit (of an unknown node, of an epoch that the node was not assigned) changes nothing:
    such come late from the network. Raises ValueError for a plan whose epoch is not new, which is a bug here.
    """
    return _with_coverage(state, _apply(state, event))


def _apply(state: ClusterState, event: Event) -> ClusterState:
    match event:
        case Planned():
            return _promote(_planned(state, event.plan, event.members))
        case Resumed():
            planned = _planned(state, event.plan, event.members)
            return replace(
                planned, active=event.plan, active_owners=planned.pending_owners, pending=None,
                pending_owners=frozenset(),
            )  # fmt: skip
        case NodeArrived():
            drained = event.name in state.nodes and state.nodes[event.name].drained
            return _with(state, Node(event.name, event.capacity, present=True, drained=drained))
        case NodeQuarantined():
            known = state.nodes.get(event.name, Node(event.name))
            return _with(state, replace(_gone(known), leaving=False, quarantine=event.sentence))
        case NodeDrained():
            return _with(state, replace(state.nodes.get(event.name, Node(event.name)), drained=True))
        case NodeReadmitted():
            return _readmitted(state, event.name)
    node = state.nodes.get(event.name)
    # An absent node can leave too: it is forgotten once the others have its experts.
    if node is None or not (node.present or isinstance(event, NodeLeaving)):
        return state
    match event:
        case NodeAway():
            owner = event.name in state.active_owners or event.name in state.pending_owners
            if node.leaving and not owner and not node.drained:
                return replace(state, nodes=_frozen({n: x for n, x in state.nodes.items() if n != event.name}))
            return _with(state, _gone(node))
        case NodeLeaving():
            return state if node.leaving else _with(state, replace(node, leaving=True))
        case HeartbeatReceived():
            return _with(state, replace(node, figures=event.figures))
        case SliceAssigned():
            alive = {plan.epoch for plan in (state.active, state.pending) if plan is not None}
            if event.epoch not in alive:
                return state
            assigned = node.assigned | {event.epoch}
            return _with(state, replace(node, assigned=assigned, bytes_done=0, bytes_total=0, problem=""))
        case _ if event.epoch not in node.assigned:
            return state
        case SliceProgressed():
            return _with(state, replace(node, bytes_done=event.bytes_done, bytes_total=event.bytes_total))
        case SliceHeld():
            return _promote(_with(state, replace(node, ready=node.ready | {event.epoch}, problem="")))
        case SliceNotHeld():
            epoch = {event.epoch}
            lost = replace(node, assigned=node.assigned - epoch, ready=node.ready - epoch, problem=event.sentence)
            return _with(state, lost)


def _gone(node: Node) -> Node:
    """The node without what ends with its control stream."""
    return Node(node.name, node.capacity, leaving=node.leaving, drained=node.drained, figures=node.figures)


def _readmitted(state: ClusterState, name: NodeName) -> ClusterState:
    node = state.nodes.get(name)
    if node is None or not (node.quarantine or node.drained):
        return state
    if node.present or name in state.active_owners or name in state.pending_owners:
        return _with(state, replace(node, quarantine="", drained=False))
    return replace(state, nodes=_frozen({n: x for n, x in state.nodes.items() if n != name}))


def _with_coverage(before: ClusterState, state: ClusterState) -> ClusterState:
    """`state` with its holders and what is missing; a plan has many experts, so only when either may have changed."""
    plan = state.active
    if plan is None or state is before:
        return state
    holders = frozenset(name for name in state.active_owners if state.holds(name, plan.epoch))
    if plan is before.active and holders == before.holders:
        return state
    missing: set[NodeName] = set()
    if holders != state.active_owners:
        for layer in plan.owners:
            for names in layer:
                if holders.isdisjoint(names):
                    missing.update(names)
    return replace(state, holders=holders, missing=tuple(sorted(missing)))


def _planned(state: ClusterState, plan: Plan, members: frozenset[NodeName]) -> ClusterState:
    if plan.epoch <= state.epoch:
        raise ValueError(f"A plan of epoch {plan.epoch} can't follow one of epoch {state.epoch}.")
    owners = frozenset(plan.slices)
    nodes = dict(state.nodes)
    for name in owners | members:
        nodes.setdefault(name, Node(name))  # of a stored plan; away until it is seen
    state = replace(
        state, pending=plan, pending_owners=owners, members=members, epoch=plan.epoch, nodes=_frozen(nodes)
    )
    return _forget_epochs(state)


def _promote(state: ClusterState) -> ClusterState:
    """Makes the pending plan the active one if all of its owners are ready for it."""
    plan = state.pending
    if plan is None or not all(state.holds(name, plan.epoch) for name in state.pending_owners):
        return state
    owners = state.pending_owners
    # Nodes that were leaving and are gone by now have no part in anything any more.
    nodes = {
        n: x for n, x in state.nodes.items() if x.present or x.quarantine or x.drained or not x.leaving or n in owners
    }
    state = replace(
        state, active=plan, active_owners=owners, pending=None, pending_owners=frozenset(), nodes=_frozen(nodes)
    )
    return _forget_epochs(state)


def _forget_epochs(state: ClusterState) -> ClusterState:
    """Drops the epochs of plans that are alive no more from the nodes."""
    alive = frozenset(plan.epoch for plan in (state.active, state.pending) if plan is not None)
    nodes = {n: replace(x, assigned=x.assigned & alive, ready=x.ready & alive) for n, x in state.nodes.items()}
    return replace(state, nodes=_frozen(nodes))


def _with(state: ClusterState, node: Node) -> ClusterState:
    return replace(state, nodes=_frozen({**state.nodes, node.name: node}))


def _frozen(nodes: dict[NodeName, Node]) -> Mapping[NodeName, Node]:
    return MappingProxyType(dict(sorted(nodes.items())))
