"""The pure state: whatever the order of events, what it promises holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.cluster.events import (
    HeartbeatReceived,
    NodeArrived,
    NodeAway,
    NodeDrained,
    NodeLeaving,
    NodeReadmitted,
    Planned,
    SliceAssigned,
    SliceHeld,
    SliceNotHeld,
    SliceProgressed,
)
from moehive.coordinator.cluster.state import (
    Capacity,
    ClusterState,
    Figures,
    Phase,
)
from moehive.coordinator.cluster.transitions import apply
from moehive.coordinator.types import Plan

NAMES = st.sampled_from(["attic", "cellar", "desk"])
STEPS = st.integers(0, 3)  # back from the latest epoch


def plan(epoch, *owners):
    return Plan(epoch, (tuple((name,) for name in owners),))


# An event is made from the state that it meets, so that epochs are often, but not always, the right ones.
EVENTS = st.one_of(
    st.builds(lambda n: lambda s: NodeArrived(n, Capacity("h:1", 10)), NAMES),
    st.builds(lambda n: lambda s: NodeAway(n), NAMES),
    st.builds(lambda n: lambda s: NodeLeaving(n), NAMES),
    st.builds(lambda n: lambda s: NodeDrained(n), NAMES),
    st.builds(lambda n: lambda s: NodeReadmitted(n), NAMES),
    st.builds(lambda n: lambda s: HeartbeatReceived(n, Figures(calls=7)), NAMES),
    st.builds(lambda n, k: lambda s: SliceAssigned(n, s.epoch - k), NAMES, STEPS),
    st.builds(lambda n, k: lambda s: SliceProgressed(n, s.epoch - k, 1, 2), NAMES, STEPS),
    st.builds(lambda n, k: lambda s: SliceHeld(n, s.epoch - k), NAMES, STEPS),
    st.builds(lambda n, k: lambda s: SliceNotHeld(n, s.epoch - k, "no room"), NAMES, STEPS),
    st.builds(
        lambda owners, more, jump: (
            lambda s: Planned(plan(s.epoch + jump, *owners), frozenset(owners) | frozenset(more))
        ),
        st.lists(NAMES, min_size=1, max_size=3),
        st.lists(NAMES, max_size=1),
        st.integers(1, 3),
    ),
)


@given(st.lists(EVENTS, max_size=60))
@settings(max_examples=400, deadline=None)
def test_what_the_state_promises_holds_after_any_events(events):
    state = ClusterState()
    reported: dict[str, set[int]] = {}  # epochs that each node has reported ready since it arrived
    drained: set[str] = set()
    for make in events:
        before, event = state, make(state)
        state = apply(before, event)
        match event:
            case NodeArrived() | NodeAway():
                reported[event.name] = set()
            case SliceHeld():
                reported.setdefault(event.name, set()).add(event.epoch)
            case NodeDrained():
                drained.add(event.name)
            case NodeReadmitted():
                drained.discard(event.name)
        assert state.epoch >= before.epoch
        if state.active is not before.active:
            # A plan comes into force only when all that it names are here and have said that they hold it.
            assert state.active is before.pending or state.active is getattr(event, "plan", None)
            assert before.active is None or state.active.epoch > before.active.epoch
            for (name,) in state.active.owners[0]:
                assert state.nodes[name].present
                assert state.active.epoch in reported[name]
            assert state.ready
        assert state.pending is None or state.pending.epoch == state.epoch
        alive = {p.epoch for p in (state.active, state.pending) if p is not None}
        for name, node in state.nodes.items():
            assert node.ready <= node.assigned <= alive
            assert node.present or not node.assigned
            assert (state.phase(name) is Phase.AWAY) == (not node.present)
        assert {name for name, node in state.nodes.items() if node.drained} == drained
        assert state.active_owners | state.pending_owners <= set(state.nodes)
        assert state.ready == (state.active is not None and not state.missing)


def play(*events):
    state = ClusterState()
    for event in events:
        state = apply(state, event)
    return state


HERE = Capacity("h:1", 10)


def test_the_life_of_a_node():
    joined = play(NodeArrived("attic", HERE))
    assert joined.phase("attic") is Phase.JOINING
    loading = play(
        NodeArrived("attic", HERE), Planned(plan(1, "attic"), frozenset({"attic"})), SliceAssigned("attic", 1)
    )
    assert loading.phase("attic") is Phase.LOADING
    assert not loading.ready
    ready = apply(loading, SliceHeld("attic", 1))
    assert ready.phase("attic") is Phase.READY
    assert ready.ready
    leaving = apply(ready, NodeLeaving("attic"))
    assert leaving.phase("attic") is Phase.LEAVING
    assert leaving.ready  # it serves until it goes
    away = apply(leaving, NodeAway("attic"))
    assert away.phase("attic") is Phase.AWAY
    assert away.missing == ("attic",)
    back = apply(away, NodeArrived("attic", HERE))
    assert not back.ready  # it is not believed to hold anything yet
    again = apply(apply(back, SliceAssigned("attic", 1)), SliceHeld("attic", 1))
    assert again.ready


def test_the_old_plan_serves_while_the_new_one_is_loaded():
    both = frozenset({"attic", "cellar"})
    state = play(
        NodeArrived("attic", HERE),
        NodeArrived("cellar", HERE),
        Planned(plan(1, "attic"), frozenset({"attic"})),
        SliceAssigned("attic", 1),
        SliceHeld("attic", 1),
        Planned(plan(2, "attic", "cellar"), both),
        SliceAssigned("attic", 2),
        SliceAssigned("cellar", 2),
        SliceHeld("cellar", 2),
    )
    assert state.active.epoch == 1
    assert state.ready
    assert state.phase("attic") is Phase.READY
    switched = apply(state, SliceHeld("attic", 2))
    assert switched.active.epoch == 2
    assert switched.pending is None
    assert switched.nodes["attic"].ready == {2}


def test_a_report_for_an_epoch_that_was_not_assigned_is_not_believed():
    state = play(NodeArrived("attic", HERE), Planned(plan(1, "attic"), frozenset()), SliceHeld("attic", 1))
    assert state.active is None


def test_a_drained_node_is_forgotten_once_it_is_gone():
    state = play(
        NodeArrived("attic", HERE),
        NodeArrived("cellar", HERE),
        Planned(plan(1, "attic"), frozenset({"attic"})),
        SliceAssigned("attic", 1),
        SliceHeld("attic", 1),
        NodeLeaving("attic"),
        Planned(plan(2, "cellar"), frozenset({"cellar"})),
        SliceAssigned("cellar", 2),
        NodeAway("attic"),
    )
    assert "attic" in state.nodes
    assert "attic" not in apply(state, SliceHeld("cellar", 2)).nodes


def test_a_node_is_drained_until_it_is_readmitted():
    state = play(
        NodeArrived("attic", HERE),
        NodeArrived("cellar", HERE),
        Planned(plan(1, "attic"), frozenset({"attic", "cellar"})),
        SliceAssigned("attic", 1),
        SliceHeld("attic", 1),
        HeartbeatReceived("attic", Figures(experts_held=1)),
        NodeDrained("attic"),
    )
    assert state.ready and state.phase("attic") is Phase.DRAINING
    state = apply(state, Planned(plan(2, "cellar"), frozenset({"cellar"})))
    state = apply(apply(state, SliceAssigned("cellar", 2)), SliceHeld("cellar", 2))
    assert state.active.epoch == 2 and state.phase("attic") is Phase.DRAINING  # it holds them still
    state = apply(state, HeartbeatReceived("attic", Figures()))
    assert state.phase("attic") is Phase.DRAINED
    for event in (NodeLeaving("attic"), NodeAway("attic"), NodeArrived("attic", HERE)):
        state = apply(state, event)
    assert state.phase("attic") is Phase.DRAINED
    assert apply(state, NodeReadmitted("attic")).phase("attic") is Phase.JOINING
    assert "attic" not in apply(apply(state, NodeAway("attic")), NodeReadmitted("attic")).nodes


def test_epochs_only_grow():
    with pytest.raises(ValueError, match="can't follow"):
        play(Planned(plan(2, "attic"), frozenset()), Planned(plan(2, "attic"), frozenset()))
