"""The lower bound against the best of all plans of tiny clusters, and that two sets of places prove more than one."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.placement import synthetic
from moehive.coordinator.placement.bound import lower_bounds
from moehive.coordinator.placement.bound_layer import LayerHits, Multipliers, Prices
from moehive.coordinator.placement.cluster import Cluster, Node, Tier
from moehive.coordinator.placement.makespan import layer_costs
from moehive.coordinator.placement.native import least_sum
from moehive.coordinator.placement.search import by_mix
from moehive.coordinator.placement.slots import share_out
from moehive.coordinator.placement.traces import Mix, Trace, sample

SIZE = 1_000_000


def cluster_of(*nodes):
    """Nodes of (slots, bytes a second, round trip)."""
    return Cluster(
        tuple(
            Node(name=f"n{index}", rtt_s=rtt, msg_s=5e-5, tiers=(Tier(slots * SIZE, bandwidth),))
            for index, (slots, bandwidth, rtt) in enumerate(nodes)
        ),
        (SIZE,),
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_of_all_is_below_the_bound(seed):
    random = np.random.default_rng(seed)
    experts, mixes = 5, (Mix(1), Mix(2))
    draws = [(int(random.integers(2, 4)), float(random.choice([2e10, 1e11, 4e11])), float(rtt)) for rtt in
             random.choice([0.0, 3e-4, 3e-3], 3)]  # fmt: skip
    cluster = cluster_of(*draws)
    popular = random.permutation(5) + 1.0
    chosen = np.stack([random.choice(experts, 2, False, popular / popular.sum()) for _ in range(60)])
    trace = Trace(chosen.astype(np.uint16)[None], np.arange(60, dtype=np.uint32))
    batches = sample(trace, mixes, (60, 60), seed)
    costs = layer_costs(cluster, 0, mixes)
    slots = np.array([place.mem_bytes // SIZE for place in cluster.places], dtype=np.int32)
    held = [list(combinations(range(experts), count)) for count in slots.tolist()]
    best = np.full(2, np.inf)
    for plan in product(*held):
        replicas = np.zeros(experts, dtype=np.uint64)
        for place, some in enumerate(plan):
            replicas[list(some)] |= np.uint64(1 << place)
        if (replicas != 0).all():
            best = np.minimum(best, by_mix(costs, batches[0], replicas, 2))
    found = lower_bounds(cluster, mixes, batches, experts, slots[None])
    assert (found.any_plan <= found.same_slots).all()
    assert (found.same_slots <= best * (1 + 1e-9)).all()
    assert (found.same_slots > 0.5 * best).all()


def test_two_sets_prove_more_for_single_tokens_on_uneven_nodes(monkeypatch):
    cluster = synthetic.cluster("C", 256, 1, 7 * SIZE, 0.25)
    batches = sample(synthetic.trace(1, 256, 8, 30, 0), [Mix(1)], (2000,), 0)
    slots = share_out(cluster, [256])
    two = lower_bounds(cluster, [Mix(1)], batches, 256, slots).same_slots
    monkeypatch.setattr(LayerHits, "can_pair", lambda self: False)
    one = lower_bounds(cluster, [Mix(1)], batches, 256, slots).same_slots
    assert two > one * 1.01


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), experts=st.integers(2, 70), sets=st.integers(1, 2), nested=st.sampled_from([-1, 0, 1])
)
def test_the_least_of_times_and_prices_is_that_of_trying_all(seed, experts, sets, nested):
    random = np.random.default_rng(seed)
    parts = [random.choice(experts, random.integers(1, min(6, experts) + 1), False) for _ in range(5)]
    most = max(map(len, parts))
    kind = random.integers(2, size=5).astype(np.int32)
    times, price, pair = random.random((sets, 2, most + 1)), random.normal(size=(sets, experts)), random.random(sets)
    hits = np.concatenate(parts).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(list(map(len, parts)))])
    found = least_sum(offsets, hits, kind, times, nested, price, pair)
    total = 0.0
    for number, part in enumerate(parts):
        costs = [
            [np.sort(price[s][part])[:h].sum() + pair[s] * h * (h - 1) / 2 for h in range(len(part) + 1)]
            for s in range(sets)
        ]
        total += min(
            max(times[s][kind[number]][h] for s, h in enumerate(taken))
            + sum(costs[s][h] for s, h in enumerate(taken))
            for taken in product(range(len(part) + 1), repeat=sets)
            if sets == 1 or not nested or (taken[0] - taken[1]) * nested >= 0
        )
    assert found.sum == pytest.approx(total, rel=1e-9)
    assert found.used.shape == (sets, experts) and found.used.sum() >= (found.pairs > 0).sum()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), room=st.integers(0, 6))
def test_any_prices_prove_a_bound_and_steps_only_raise_it(seed, room):
    random = np.random.default_rng(seed)
    experts = 6
    cluster = cluster_of((3, 4e11, 0.0), (6, 2e10, 3e-4))
    chosen = np.stack([random.choice(experts, 3, False) for _ in range(40)]).astype(np.uint16)
    batches = sample(Trace(chosen[None], np.arange(40, dtype=np.uint32)), [Mix(1)], (40,), seed)[0]
    usable = np.ones(2, dtype=np.bool_)
    layer = LayerHits.of(layer_costs(cluster, 0, [Mix(1)]), 0, batches, experts, usable)
    one = layer.at(np.array([False, True]), usable, room)
    psi = one.times[0]
    best = min(
        float(np.mean([psi[len(set(row) & set(outside))] for row in chosen.tolist()]))
        for outside in combinations(range(experts), room)
    )
    any_prices = Prices(random.normal(scale=1e-4, size=(1, experts)), random.random(1) * 1e-4)
    assert layer.raise_bound([one], any_prices, 1)[0] <= best * (1 + 1e-9)
    shared, multipliers = layer.search([one])
    own, prices = layer.raise_bound([one], layer.prices(multipliers), 30)
    assert shared * (1 - 1e-9) <= own <= best * (1 + 1e-9)
    assert layer.curve(one, prices)[room] == pytest.approx(own, rel=1e-9)
    assert layer.prices([Multipliers(1.0, 2.0)]).pair.tolist() == [2.0]
