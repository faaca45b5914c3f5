"""Placement by memory: whole, within every node's memory, in proportion, repeatable, and moving little."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.placement.shares import place_by_memory
from moehive.coordinator.placement.slots import amount
from moehive.coordinator.types import LOCAL, CoordinatorError
from moehive.kernels.geometry import ExpertSpec, LayerGeometry


def layer(experts, intermediate=32):
    spec = ExpertSpec(hidden_size=64, intermediate_size=intermediate, activation="silu", format="bf16")
    return LayerGeometry(experts, 1, spec)


SIZE = layer(1).spec.nbytes


def bytes_of(plan, layers):
    held = Counter()
    for owners, geometry in zip(plan.owners, layers, strict=True):
        for (node,) in owners:
            held[node] += geometry.spec.nbytes
    return held


layers_strategy = st.lists(
    st.builds(layer, st.integers(1, 40), st.sampled_from([16, 32, 48])), min_size=1, max_size=6
)
capacities_strategy = st.dictionaries(
    st.sampled_from(["attic", "cellar", "desk", "den", "hall", LOCAL]), st.integers(0, 4_000_000), min_size=1
)


@given(capacities_strategy, layers_strategy)
@settings(deadline=None)
def test_every_expert_has_one_owner_within_its_memory_or_the_lack_is_said(capacities, layers):
    total = sum(x.experts * x.spec.nbytes for x in layers)
    try:
        plan = place_by_memory(capacities, layers, 3)
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
        place_by_memory(capacities, layers, 1)
    else:
        with pytest.raises(CoordinatorError):
            place_by_memory(capacities, layers, 1)


@given(capacities_strategy, layers_strategy)
@settings(deadline=None)
def test_the_order_of_the_arguments_does_not_matter_and_the_plan_repeats(capacities, layers):
    backwards = dict(reversed(capacities.items()))
    try:
        plan = place_by_memory(capacities, layers, 1)
    except CoordinatorError:
        return
    assert place_by_memory(backwards, layers, 1) == plan
    # With itself as the previous plan nothing moves.
    assert place_by_memory(capacities, layers, 1, plan) == plan


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 1000), min_size=1), st.integers(1, 300))
@settings(deadline=None)
def test_each_layer_is_split_as_the_memory_is(weights, experts):
    layers = [layer(experts)] * 5
    # Room for twice the model, so that only the shares decide.
    unit = 2 * SIZE * experts * 5
    plan = place_by_memory({node: weight * unit for node, weight in weights.items()}, layers, 1)
    total = sum(weights.values())
    for owners in plan.owners:
        counts = Counter(node for (node,) in owners)
        for node, weight in weights.items():
            # One for rounding in this layer, one for what rounding took in the layers before.
            assert abs(counts[node] - experts * weight / total) < 2
    held = Counter(node for owners in plan.owners for (node,) in owners)
    for node, weight in weights.items():  # and over all layers it is exact to one expert
        assert abs(held[node] - 5 * experts * weight / total) <= 1


def test_three_equal_nodes():
    plan = place_by_memory(dict.fromkeys(("a", "b", "c"), 1 << 30), [layer(8), layer(8), layer(8)], 1)
    per_layer = [sorted(Counter(node for (node,) in owners).values()) for owners in plan.owners]
    assert per_layer == [[2, 3, 3]] * 3
    assert Counter(node for owners in plan.owners for (node,) in owners) == {"a": 8, "b": 8, "c": 8}


def moved(before, after):
    pairs = zip(before.owners, after.owners, strict=True)
    return sum(x != y for old, new in pairs for x, y in zip(old, new, strict=True))


def test_a_node_that_joins_gets_its_share_and_little_else_moves():
    layers = [layer(128)] * 10
    before = place_by_memory(dict.fromkeys("abc", 1 << 30), layers, 1)
    after = place_by_memory(dict.fromkeys("abcd", 1 << 30), layers, 2, before)
    share = len(after.slice_of("d")[0])
    assert share == 32
    assert moved(before, after) <= 10 * (32 + 3)  # rounding may shift one expert a layer and node


def test_a_node_that_leaves_gives_its_share_and_little_else_moves():
    layers = [layer(128)] * 10
    before = place_by_memory(dict.fromkeys("abcd", 1 << 30), layers, 1)
    after = place_by_memory(dict.fromkeys("abc", 1 << 30), layers, 2, before)
    assert not any(after.slice_of("d"))
    assert moved(before, after) <= 10 * (32 + 3)


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
        old = place_by_memory(first, layers, 1)
        new = place_by_memory(second, layers, 2, old)
    except CoordinatorError:
        return
    for node in first.keys() & second.keys():
        pairs = zip(old.slice_of(node), new.slice_of(node), strict=True)
        assert sum(len(set(x) | set(y)) for x, y in pairs) * SIZE <= first[node]


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
        place_by_memory({"attic": 2 * SIZE, "cellar": SIZE}, [layer(1000)] * 10, 1)
    with pytest.raises(CoordinatorError, match="0 machines give 0 bytes"):
        place_by_memory({}, [layer(1)], 1)
