"""When a new plan is tried: pure decisions over made-up states."""

from moehive.coordinator.cluster.policy import REPLACE_SECONDS, usable, wants_plan
from moehive.coordinator.cluster.state import (
    Capacity,
    ClusterState,
    Node,
    NodeArrived,
    NodeAway,
    NodeDrained,
    NodeReadmitted,
    Planned,
    SliceAssigned,
    SliceHeld,
    apply,
)
from moehive.coordinator.types import NodeName, Plan

A, B, C = NodeName("a"), NodeName("b"), NodeName("c")


def running(*names: NodeName) -> ClusterState:
    """A cluster that serves a plan over `names`."""
    state = ClusterState()
    for name in names:
        state = apply(state, NodeArrived(name, Capacity("127.0.0.1:1", 1 << 30)))
    plan = Plan(1, (tuple((name,) for name in names),))
    state = apply(state, Planned(plan, frozenset(names)))
    for name in names:
        state = apply(apply(state, SliceAssigned(name, 1)), SliceHeld(name, 1))
    assert state.ready
    return state


def test_a_calm_cluster_is_left_alone() -> None:
    assert not wants_plan(running(A, B), 2, {}, {})


def test_the_first_plan_waits_for_enough_nodes() -> None:
    state = apply(ClusterState(), NodeArrived(A, Capacity("127.0.0.1:1", 1 << 30)))
    assert not wants_plan(state, 2, {}, {})
    assert wants_plan(state, 1, {}, {})


def test_a_newcomer_gets_its_share() -> None:
    state = apply(running(A, B), NodeArrived(C, Capacity("127.0.0.1:1", 1 << 30)))
    assert wants_plan(state, 2, {}, {})


def test_a_node_away_keeps_its_place_for_a_while_and_then_loses_it() -> None:
    state = apply(running(A, B), NodeAway(B))
    assert not wants_plan(state, 2, {}, {B: REPLACE_SECONDS - 1})
    assert wants_plan(state, 2, {}, {B: REPLACE_SECONDS})


def test_nobody_is_replaced_while_another_may_only_be_starting_again() -> None:
    state = apply(apply(running(A, B, C), NodeAway(B)), NodeAway(C))
    assert not wants_plan(state, 2, {}, {B: REPLACE_SECONDS + 5, C: 1})


def test_a_node_that_came_back_smaller_than_its_slice_needs_a_plan() -> None:
    assert wants_plan(running(A, B), 2, {A: 2 << 30}, {})


def test_a_drained_node_is_planned_without_and_is_a_newcomer_when_it_is_readmitted() -> None:
    state = apply(running(A, B, C), NodeDrained(C))
    assert wants_plan(state, 2, {}, {}) and usable(state, 1).keys() == {A, B}
    state = apply(running(A, B), NodeArrived(C, Capacity("127.0.0.1:1", 1 << 30)))
    assert not wants_plan(apply(state, NodeDrained(C)), 2, {}, {})
    assert wants_plan(apply(apply(state, NodeDrained(C)), NodeReadmitted(C)), 2, {}, {})


def test_memory_first_then_disk_in_proportion():
    def give(ram, disk):
        return Capacity("h:1", ram, disk_bytes=disk)

    state = ClusterState(
        nodes={name: Node(name, give(*size), present=True) for name, size in {A: (100, 900), B: (50, 20)}.items()}
    )
    assert usable(state, 150) == {A: 100, B: 50}  # memory is enough
    here = usable(state, 200)
    assert here[B] == 70 and 200 <= sum(here.values()) <= 215  # B's disk is full before A's
    assert usable(state, 10_000) == {A: 1000, B: 70}  # what there is, and it will be refused
    assert usable(state, 500, without=A) == {B: 70}
