"""Exact dispatch and the search: against brute force, Hall's condition and a mixed-integer program."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moehive.coordinator.placement.makespan import time_for
from moehive.coordinator.placement.native import Search, anneal, makespans

SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(seed=st.integers(0, 2**32), experts=st.integers(1, 7), places=st.integers(1, 4))
def test_dispatch_is_as_good_as_trying_all(dispatch, seed, experts, places):
    costs, batches, replicas, _ = dispatch.layer(seed, experts, places, 6)
    for number, found in enumerate(makespans(costs, batches, replicas)):
        hits = batches.hits[batches.offsets[number] : batches.offsets[number + 1]]
        assert found == pytest.approx(dispatch.trying_all(costs, hits, replicas), rel=1e-9)


@SLOW
@given(seed=st.integers(0, 2**32), experts=st.integers(8, 40), places=st.integers(2, 6))
def test_dispatch_meets_halls_condition(dispatch, seed, experts, places):
    costs, batches, replicas, _ = dispatch.layer(seed, experts, places, 3)
    for number, found in enumerate(makespans(costs, batches, replicas)):
        hits = batches.hits[batches.offsets[number] : batches.offsets[number + 1]]
        assert found == pytest.approx(dispatch.hall(costs, hits, replicas), rel=1e-9)


@SLOW
@given(seed=st.integers(0, 2**32), experts=st.integers(2, 40), places=st.integers(2, 12))
def test_the_search_keeps_its_books_and_its_limits(dispatch, seed, experts, places):
    costs, batches, replicas, slots = dispatch.layer(seed, experts, places, 30)
    random = np.random.default_rng(seed)
    weight = random.random(30)
    pinned = np.where(random.random(experts) < 0.1, replicas, 0).astype(np.uint64)
    search = Search(slots, pinned, np.zeros(experts, np.uint64), 0.0, 400, seed, 0.5, 0.01)
    better, cost = anneal(costs, batches, weight, replicas, search)
    # The cost that it kept account of, step by step, is that of dispatching anew.
    assert cost == pytest.approx(float(weight @ makespans(costs, batches, better)), rel=1e-9)
    assert cost <= float(weight @ makespans(costs, batches, replicas)) * (1 + 1e-9)
    assert (better != 0).all() and (better & pinned == pinned).all()
    for place in range(places):
        assert np.count_nonzero(better >> np.uint64(place) & np.uint64(1)) <= slots[place]
    assert (anneal(costs, batches, weight, replicas, search)[0] == better).all()


def test_copies_that_cost_more_than_they_bring_are_not_made(dispatch):
    costs, batches, replicas, slots = dispatch.layer(1, 30, 4, 60)
    weight = np.full(60, 1 / 60)
    dear = Search(slots, np.zeros(30, np.uint64), replicas, 1e6, 4000, 1, 0.1, 0.001)
    assert int(np.bitwise_count(anneal(costs, batches, weight, replicas, dear)[0] & ~replicas).sum()) == 0


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 1)), min_size=1, max_size=5), st.integers(0, 30))
def test_time_of_free_placement(places, wanted):
    fixed, step = (np.array(column) for column in zip(*places, strict=True))
    t = float(time_for(fixed, step, wanted)[0])
    done = np.floor(np.maximum(0, (t * (1 + 1e-12) - fixed) / step + 1e-9)).sum() if wanted else 0
    assert done >= wanted
    before = np.floor(np.maximum(0, (t * (1 - 1e-6) - fixed) / step)).sum()
    assert not wanted or before < wanted


def test_the_search_finds_what_a_mixed_integer_program_finds(dispatch):
    highspy = pytest.importorskip("highspy")
    experts, places, batches = 6, 3, 8
    costs, parts, _, _ = dispatch.layer(5, experts, places, batches, most=4)
    costs.always[:] = 0.0
    slots = np.array([3, 3, 3], np.int32)
    first = np.array([1, 1, 1, 2, 2, 2], np.uint64)
    zero = np.zeros(experts, np.uint64)
    search = Search(slots, zero, zero, 0.0, 20_000, 3, 0.2, 1e-4)
    _, cost = anneal(costs, parts, np.full(batches, 1 / batches), first, search)

    model = highspy.Highs()
    model.silent()
    held = [[model.addBinary() for _ in range(places)] for _ in range(experts)]
    for place in range(places):
        model.addConstr(sum(held[e][place] for e in range(experts)) <= int(slots[place]))
    for expert in range(experts):
        model.addConstr(sum(held[expert]) >= 1)
    ends = []
    for number in range(batches):
        end = model.addVariable(lb=0)
        ends.append(end)
        hits = parts.hits[parts.offsets[number] : parts.offsets[number + 1]]
        sent = {(e, p): model.addBinary() for e in hits.tolist() for p in range(places)}
        for e in hits.tolist():
            model.addConstr(sum(sent[e, p] for p in range(places)) == 1)
            for p in range(places):
                model.addConstr(sent[e, p] <= held[e][p])
        for p in range(places):
            asked = model.addBinary()
            for e in hits.tolist():
                model.addConstr(sent[e, p] <= asked)
            load = sum(sent[e, p] for e in hits.tolist()) * float(costs.step[p])
            model.addConstr(end >= load + float(costs.fixed[0, p]) * asked)
    model.minimize(sum(ends) * (1 / batches))
    assert cost == pytest.approx(model.getInfo().objective_function_value, rel=1e-6)
