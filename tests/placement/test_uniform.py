"""The plan without traffic: whole, within memory, by what nodes can do, repeatable, and moving little."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.placement.cluster import MAX_NODES
from moehive.coordinator.placement.place import Measured, place
from moehive.coordinator.placement.slots import amount
from moehive.coordinator.types import LOCAL, CoordinatorError, Plan
from moehive.kernels.geometry import ExpertSpec, LayerGeometry


def layer(experts, intermediate=32):
    spec = ExpertSpec(hidden_size=64, intermediate_size=intermediate, activation="silu", format="bf16")
    return LayerGeometry(experts, 1, spec)


SIZE = layer(1).spec.nbytes


def uniform(capacities, layers, epoch=1, previous=None, measured=None):
    return place(capacities, measured or {}, layers, None, epoch, previous)


def bytes_of(plan, layers):
    held = Counter()
    for owners, geometry in zip(plan.owners, layers, strict=True):
        for (node,) in owners:
            held[node] += geometry.spec.nbytes
    return held


def counts(plan, at=0):
    return Counter(node for (node,) in plan.owners[at])


layers_strategy = st.lists(
    st.builds(layer, st.integers(1, 40), st.sampled_from([16, 32, 48])), min_size=1, max_size=6
)
capacities_strategy = st.dictionaries(
    st.sampled_from(["attic", "cellar", "desk", "den", "hall", LOCAL]), st.integers(0, 4_000_000), min_size=1
)
speeds_strategy = st.fixed_dictionaries(
    {},
    optional={
        name: st.builds(Measured, st.sampled_from([0.0, 1e9, 4e11]), st.sampled_from([0.0, 2e-4, 3e-3]))
        for name in ("attic", "cellar", "desk")
    },
)


@given(capacities_strategy, layers_strategy, speeds_strategy)
@settings(deadline=None)
def test_every_expert_has_one_owner_within_its_memory_or_the_lack_is_said(capacities, layers, measured):
    total = sum(x.experts * x.spec.nbytes for x in layers)
    try:
        plan = uniform(capacities, layers, 3, measured=measured)
    except CoordinatorError as error:
        # Only fragments smaller than one expert may be left over on each node.
        largest = max(x.spec.nbytes for x in layers)
        assert total > sum(capacities.values()) - largest * len(capacities)
        assert "is missing" in str(error)
        return
    assert plan.epoch == 3
    assert [len(owners) for owners in plan.owners] == [x.experts for x in layers]
    assert all(len(nodes) == 1 for owners in plan.owners for nodes in owners)
    for node, held in bytes_of(plan, layers).items():
        assert held <= capacities[node]


@given(capacities_strategy, st.integers(1, 40), st.integers(1, 6))
@settings(deadline=None)
def test_equal_experts_fit_whenever_the_whole_slots_suffice(capacities, experts, count):
    layers = [layer(experts)] * count
    slots = sum(size // SIZE for size in capacities.values())
    if slots >= experts * count:
        uniform(capacities, layers)
    else:
        with pytest.raises(CoordinatorError):
            uniform(capacities, layers)


@given(capacities_strategy, layers_strategy, speeds_strategy)
@settings(deadline=None)
def test_the_order_of_the_arguments_does_not_matter_and_the_plan_repeats(capacities, layers, measured):
    try:
        plan = uniform(capacities, layers, measured=measured)
    except CoordinatorError:
        return
    assert uniform(dict(reversed(capacities.items())), layers, measured=measured) == plan
    # With itself as the previous plan nothing moves.
    assert uniform(capacities, layers, 1, plan, measured) == plan


def test_equal_nodes_get_equal_shares():
    plan = uniform(dict.fromkeys(("a", "b", "c"), 1 << 30), [layer(8), layer(8), layer(8)])
    assert [sorted(counts(plan, at).values()) for at in range(3)] == [[2, 3, 3]] * 3
    assert bytes_of(plan, [layer(8)] * 3) == dict.fromkeys(("a", "b", "c"), 8 * SIZE)


def test_a_quick_node_gets_more_and_a_far_one_less_as_far_as_memory_goes():
    big = ExpertSpec(hidden_size=2048, intermediate_size=1024, activation="silu", format="bf16")
    layers = [LayerGeometry(64, 4, big)] * 3
    room = layers[0].nbytes * 6
    measured = {"quick": Measured(40e9, 3e-4), "slow": Measured(10e9, 3e-4), "far": Measured(40e9, 5e-2)}
    shares = counts(uniform(dict.fromkeys(measured, room), layers, measured=measured))
    assert shares["quick"] > 3 * shares["slow"] > 0
    assert shares["far"] == 0  # the others are done before it has answered
    # What a quick node has no memory for goes elsewhere, a part of each layer.
    plan = uniform({"quick": 60 * big.nbytes, "slow": room, "far": room}, layers, measured=measured)
    for at in range(3):
        assert counts(plan, at)["quick"] == 16 and counts(plan, at)["far"] == 0
    # Only what fits nowhere else goes far away.
    plan = uniform({"quick": 60 * big.nbytes, "slow": 120 * big.nbytes, "far": room}, layers, measured=measured)
    assert 0 < counts(plan)["far"] < 32


def test_the_coordinators_own_memory_has_no_round_trip():
    capacities = {LOCAL: 1 << 30, "far": 1 << 30}
    assert counts(uniform(capacities, [layer(16)], measured={"far": Measured(10e9, 3e-3)})) == {LOCAL: 16}


def test_nodes_of_one_machine_count_alike():
    measured = {
        "a": Measured(9e9, 4e-4, machine="10.0.0.1"),
        "b": Measured(3e9, 1e-4, machine="10.0.0.1"),
        "c": Measured(0.0, 9e-4, machine="10.0.0.1"),
    }
    plan = uniform(dict.fromkeys("abc", 1 << 30), [layer(12)], measured=measured)
    assert counts(plan) == dict.fromkeys("abc", 4)


def test_more_nodes_than_the_planner_knows_leave_the_smallest_empty():
    capacities = {f"n{number:03}": SIZE * (10 + number % 2) for number in range(2 * MAX_NODES)}
    plan = uniform(capacities, [layer(3 * MAX_NODES)])
    assert set(plan.slices) == {name for name, size in capacities.items() if size == 11 * SIZE}


def moved(before, after):
    pairs = zip(before.owners, after.owners, strict=True)
    return sum(x != y for old, new in pairs for x, y in zip(old, new, strict=True))


def test_a_node_that_joins_gets_its_share_and_little_else_moves():
    layers = [layer(128)] * 10
    before = uniform(dict.fromkeys("abc", 1 << 30), layers)
    after = uniform(dict.fromkeys("abcd", 1 << 30), layers, 2, before)
    share = len(after.slice_of("d")[0])
    assert share == 32
    assert moved(before, after) <= 10 * (32 + 3)  # rounding may shift one expert a layer and node


def test_a_node_that_leaves_gives_its_share_and_little_else_moves():
    layers = [layer(128)] * 10
    before = uniform(dict.fromkeys("abcd", 1 << 30), layers)
    after = uniform(dict.fromkeys("abc", 1 << 30), layers, 2, before)
    assert not any(after.slice_of("d"))
    assert moved(before, after) <= 10 * (32 + 3)


def both(old, new, node):
    """Experts that a node holds by either plan."""
    return sum(len(set(x) | set(y)) for x, y in zip(old.slice_of(node), new.slice_of(node), strict=True))


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(40, 400), min_size=2),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(40, 400), min_size=2),
    st.integers(1, 40),
)
@settings(deadline=None)
def test_a_node_has_room_for_both_plans_while_it_changes_over(before, after, experts):
    layers = [layer(experts)] * 3
    first = {node: slots * SIZE for node, slots in before.items()}
    # Nodes of both plans keep their memory; that the rest holds all is what makes the plan possible.
    second = {node: first.get(node, slots * SIZE) for node, slots in after.items()}
    try:
        old = uniform(first, layers)
        new = uniform(second, layers, 2, old)
    except CoordinatorError:
        return
    for node in first.keys() & second.keys():
        assert both(old, new, node) * SIZE <= first[node]


def test_where_shares_would_need_more_room_only_what_lost_its_node_moves():
    # Whole layers on one node each, as the planner may have left them; even shares of all would not fit beside.
    layers = [layer(20)] * 4
    old = Plan(1, tuple(((node,),) * 20 for node in "abcd"))
    capacities = dict.fromkeys("abc", 28 * SIZE)
    new = uniform(capacities, layers, 2, old)
    assert new.owners[:3] == old.owners[:3]
    assert Counter(node for (node,) in new.owners[3]).keys() == set("abc")
    assert all(both(old, new, node) <= 28 for node in "abc")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (12_345_678, "12.3 MB"), (807_000_000_000, "807 GB"),
     (5_000_000_000_000_000, "5,000 TB")],
)  # fmt: skip
def test_amounts_of_bytes_as_a_person_reads_them(count, words):
    assert amount(count) == words


def test_a_lack_of_memory_is_said_in_bytes():
    # An expert of 64 x 32, gated, bf16, has 3 * 64 * 32 * 2 bytes: 12,288.
    with pytest.raises(CoordinatorError, match=r"2 machines give 36.9 kB .* experts need 123 MB: room for 123 MB is"):
        uniform({"attic": 2 * SIZE, "cellar": SIZE}, [layer(1000)] * 10)
    with pytest.raises(CoordinatorError, match="at least one node"):
        uniform({}, [layer(1)])
