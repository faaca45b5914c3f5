"""When a new plan is tried: pure decisions over made-up states."""

import pytest

from moehive.coordinator.cluster.events import (
    NodeArrived,
    NodeAway,
    NodeDrained,
    NodeReadmitted,
    Planned,
    SliceAssigned,
    SliceHeld,
)
from moehive.coordinator.cluster.policy import REPLACE_SECONDS, usable, wants_plan
from moehive.coordinator.cluster.state import Capacity, ClusterState, Node
from moehive.coordinator.cluster.transitions import apply
from moehive.coordinator.placement.place import place
from moehive.coordinator.types import NodeName, Plan
from moehive.kernels.geometry import ExpertSpec, LayerGeometry

A, B, C = NodeName("a"), NodeName("b"), NodeName("c")
SPEC = ExpertSpec(hidden_size=64, intermediate_size=32, activation="silu", format="f32")
HALF = ExpertSpec(hidden_size=64, intermediate_size=16, activation="silu", format="f32")
SIZE = SPEC.nbytes


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
    assert wants_plan(state, 2, {}, {}) and usable(state, model(1)).keys() == {A, B}
    state = apply(running(A, B), NodeArrived(C, Capacity("127.0.0.1:1", 1 << 30)))
    assert not wants_plan(apply(state, NodeDrained(C)), 2, {}, {})
    assert wants_plan(apply(apply(state, NodeDrained(C)), NodeReadmitted(C)), 2, {}, {})


def giving(**sizes: tuple[float, float]) -> ClusterState:
    """Nodes that give memory and disk for so many experts."""
    nodes = {
        NodeName(name): Node(
            NodeName(name), Capacity("h:1", int(ram * SIZE), disk_bytes=int(disk * SIZE)), present=True
        )
        for name, (ram, disk) in sizes.items()
    }
    return ClusterState(nodes=nodes)


def model(experts: int) -> tuple[LayerGeometry, ...]:
    return (LayerGeometry(experts, 1, SPEC),)


def test_memory_first_then_disk_in_proportion() -> None:
    state = giving(a=(100, 900), b=(50, 20))
    assert usable(state, model(150)) == {A: 100 * SIZE, B: 50 * SIZE}  # memory is enough
    here = usable(state, model(200))
    assert here[A] == pytest.approx(2 * here[B], rel=1e-6) and 200 <= sum(here.values()) / SIZE <= 202
    here = usable(state, model(215))
    assert here[B] == 70 * SIZE and 215 <= sum(here.values()) / SIZE <= 216  # B's disk is full before A's
    assert usable(state, model(1070)) == {A: 1000 * SIZE, B: 70 * SIZE}  # all there is
    assert usable(state, model(500), without=A) == {B: 70 * SIZE}  # what there is, and it will be refused


@pytest.mark.parametrize(
    ("sizes", "experts"),
    [
        ({"a": (2.5, 5), "b": (2.5, 0)}, 5),  # the memory of both is that of five experts, and holds four
        ({"a": (1.9, 5), "b": (1.9, 5), "c": (1.9, 5)}, 5),
        ({"a": (1.5, 9), "b": (1.5, 9)}, 3),
        ({"a": (1000.5, 9), "b": (0.5, 9)}, 1001),
    ],
)
@pytest.mark.parametrize("alike", [True, False])
def test_memory_counts_in_whole_experts(sizes: dict[str, tuple[float, float]], experts: int, alike: bool) -> None:
    """A plan is made of what is given: else a cluster with room on its disks is refused."""
    layers = model(experts) if alike else (*model(experts - 1), LayerGeometry(2, 1, HALF))
    here = usable(giving(**sizes), layers)
    plan = place(here, {}, layers, None, 1)
    for name, size in here.items():
        assert (
            sum(layer.spec.nbytes * len(owned) for layer, owned in zip(layers, plan.slice_of(name), strict=True))
            <= size
        )
    assert sum(len(owned) for name in here for owned in plan.slice_of(name)) == sum(layer.experts for layer in layers)
