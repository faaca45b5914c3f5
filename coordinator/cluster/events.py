"""What can happen in a cluster; transitions.py says what follows, and membership.py makes them happen."""

from dataclasses import dataclass
from typing import TypeAlias

from ..types import NodeName, Plan
from .state import Capacity, Figures


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
