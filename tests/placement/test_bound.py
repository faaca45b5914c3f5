"""The lower bound against the best of all plans of tiny clusters, and that two sets of places prove more than one."""

from itertools import combinations, product

import numpy as np
import pytest

from moehive.coordinator.placement import synthetic
from moehive.coordinator.placement.bound import lower_bounds
from moehive.coordinator.placement.bound_layer import LayerHits
from moehive.coordinator.placement.cluster import Cluster, Node, Tier
from moehive.coordinator.placement.makespan import layer_costs
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
