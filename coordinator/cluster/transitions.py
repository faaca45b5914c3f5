"""How the cluster changes: one pure function, `apply(state, event) -> state`, without a clock and without I/O."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ..types import NodeName, Plan
from .events import (
    Event,
    HeartbeatReceived,
    NodeArrived,
    NodeAway,
    NodeDrained,
    NodeLeaving,
    NodeQuarantined,
    NodeReadmitted,
    Planned,
    Resumed,
    SliceAssigned,
    SliceHeld,
    SliceNotHeld,
    SliceProgressed,
)
from .state import ClusterState, Node


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
