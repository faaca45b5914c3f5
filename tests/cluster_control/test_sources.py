"""Who fetches what from where: each expert from the coordinator once, then from those that have it."""

from moehive.coordinator.cluster.events import (
    NodeArrived,
    NodeAway,
    Planned,
    SliceAssigned,
    SliceHeld,
)
from moehive.coordinator.cluster.rates import WINDOW_SECONDS, LoadRates
from moehive.coordinator.cluster.sources import Sources
from moehive.coordinator.cluster.state import Capacity, ClusterState
from moehive.coordinator.cluster.transitions import apply
from moehive.coordinator.types import LOCAL, NodeName, Plan
from moehive.kernels.geometry import ExpertId

A, B, C = NodeName("a"), NodeName("b"), NodeName("c")
E = [ExpertId(0, number) for number in range(4)]


class Scene:
    """Three nodes and the coordinator's own memory; every expert on all of them."""

    def __init__(self) -> None:
        self.state = ClusterState()
        for name in (A, B, C, LOCAL):
            self.do(NodeArrived(name, Capacity("" if name == LOCAL else f"{name}:1", 1 << 30)))
        self.do(Planned(Plan(1, (((LOCAL, A, B, C),) * 4,)), frozenset((A, B, C, LOCAL))))
        for name in (A, B, C, LOCAL):
            self.do(SliceAssigned(name, 1))
        self.sources = Sources(lambda: self.state, lambda expert: 100)

    def do(self, event) -> None:
        self.state = apply(self.state, event)

    def locate(self, asker, experts=E, avoid=()):
        return self.sources.locate(asker, experts, avoid)


def test_the_first_fetches_and_passes_on():
    scene = Scene()
    assert scene.locate(A, E[:2]) == [None, None]
    assert scene.locate(B) == [A, A, None, None]
    assert scene.locate(A) == [None, None, B, B]  # its own are asked for again: a cut
    assert scene.locate(C) == [A, B, B, B] or set(scene.locate(C)) == {A, B}


def test_what_is_passed_on_is_shared_out():
    scene = Scene()
    scene.do(SliceHeld(A, 1))
    scene.do(SliceHeld(B, 1))
    found = scene.locate(C)
    assert sorted(found) == [A, A, B, B]


def test_the_coordinators_own_memory_is_no_peer():
    scene = Scene()
    scene.do(SliceHeld(LOCAL, 1))
    assert scene.locate(A) == [None] * 4


def test_nodes_that_failed_or_are_gone_are_not_named():
    scene = Scene()
    scene.do(SliceHeld(A, 1))
    assert scene.locate(C, avoid=(A,)) == [None] * 4
    scene.do(NodeAway(A))
    scene.sources.forget(A)
    assert scene.locate(B) == [C] * 4  # c fetches them since a failed it
    scene.do(NodeAway(C))
    scene.sources.forget(C)
    assert scene.locate(B) == [None] * 4


def test_a_fault_is_said_of_known_nodes_only():
    scene = Scene()
    scene.sources.report(B, A, E[3])
    scene.sources.report(B, NodeName("nobody"), E[3])
    assert scene.sources.fault(A) == "gave b wrong bytes of expert 3 of layer 0"
    assert scene.sources.fault(B) == "" and scene.sources.fault(NodeName("nobody")) == ""


def test_a_rate_is_of_late():
    rates = LoadRates()
    assert rates.rate(A) == 0
    rates.note(A, 1, 1000, 10.0)
    assert rates.rate(A) == 0
    rates.note(A, 1, 3000, 12.0)
    assert rates.rate(A) == 1000
    for second in range(13, 60):
        rates.note(A, 1, 3000 + 10 * (second - 12), float(second))
    assert 9 <= rates.rate(A) <= 11 and WINDOW_SECONDS < 40
    rates.note(A, 2, 0, 60.0)  # another slice
    assert rates.rate(A) == 0
    rates.forget(A)
    assert rates.rate(A) == 0
