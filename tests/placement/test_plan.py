"""Whole plans: complete, within memory, above their bound, repeatable, and the same however the nodes are listed."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moehive.coordinator.placement import budget, search, synthetic
from moehive.coordinator.placement import plan as planning
from moehive.coordinator.placement.cluster import Cluster, Node, Tier, parse_cluster, read_cluster
from moehive.coordinator.placement.plan import make_plan
from moehive.coordinator.placement.plan_file import plan_json, write_json
from moehive.coordinator.placement.slots import share_out
from moehive.coordinator.placement.traces import Mix, Trace, one_by_one, parse_mixes, read_trace, sample, save_trace
from moehive.coordinator.types import CoordinatorError

SIZE = 1_000_000


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    monkeypatch.setattr(search, "MOVES", 6000)
    monkeypatch.setattr(search, "FIT_BATCHES", {1: 60, 4: 40, 16: 20, 64: 10})
    monkeypatch.setattr(planning, "SCORE_BATCHES", {1: 120, 4: 80, 16: 40, 64: 20})


nodes_strategy = st.lists(
    st.builds(
        lambda slots, bw, rtt, second: (slots, bw, rtt, second),
        st.integers(0, 60),
        st.sampled_from([20e9, 40e9, 400e9]),
        st.sampled_from([0.0, 0.3e-3, 3e-3]),
        st.sampled_from([0, 0, 0, 20]),
    ),
    min_size=1,
    max_size=6,
)


def cluster_of(parts):
    nodes = []
    for index, (slots, bandwidth, rtt, second) in enumerate(parts):
        tiers = [Tier(slots * SIZE, bandwidth)]
        if second:
            tiers.append(Tier(second * SIZE, bandwidth / 8))
        nodes.append(Node(name=f"n{index}", rtt_s=rtt, msg_s=5e-5, tiers=tuple(tiers)))
    return Cluster(tuple(nodes), (SIZE,))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=nodes_strategy, seed=st.integers(0, 1000))
def test_plans_are_whole_within_memory_above_their_bound_and_independent_of_order(parts, seed):
    trace = synthetic.trace(2, 24, 4, 12, seed)
    cluster = cluster_of(parts)
    room = sum(slots + second for slots, _, _, second in parts)
    if room < 48:
        with pytest.raises(CoordinatorError, match="is missing"):
            make_plan(cluster, trace, experts=24)
        return
    plan = make_plan(cluster, trace, experts=24, seed=seed)
    used = dict.fromkeys(range(len(cluster.places)), 0)
    for layer, chosen in enumerate(plan.replicas):
        assert (chosen != 0).all()
        for expert in range(24):
            assert plan.holders(layer, expert)
        for place in used:
            used[place] += int(np.count_nonzero(chosen >> np.uint64(place) & np.uint64(1))) * SIZE
    assert all(used[index] <= place.mem_bytes for index, place in enumerate(cluster.places))
    expected = plan.expected.sum(axis=0)
    assert (plan.bound <= plan.bound_same_slots * (1 + 1e-9)).all()
    assert (plan.bound_same_slots <= expected * (1 + 1e-9)).all()
    # The same nodes in another order get the same experts.
    other = make_plan(Cluster(tuple(reversed(cluster.nodes)), (SIZE,)), trace, experts=24, seed=seed)
    last = len(parts) - 1
    for layer in range(2):
        for expert in range(24):
            assert [last - node for node in other.holders(layer, expert)] == plan.holders(layer, expert)
    assert other.expected_s == plan.expected_s


@settings(deadline=None)
@given(parts=nodes_strategy, sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3)), min_size=1, max_size=5))
def test_slots_hold_every_layer_within_memory_or_the_lack_is_said(parts, sizes):
    nodes = cluster_of(parts).nodes
    cluster = Cluster(nodes, tuple(weight * SIZE for _, weight in sizes))
    experts = [count for count, _ in sizes]
    memory = np.array([place.mem_bytes for place in cluster.places])
    try:
        slots = share_out(cluster, experts)
    except CoordinatorError as error:
        # Only fragments smaller than the largest expert may be left on each place.
        assert memory.sum() - len(memory) * max(cluster.expert_bytes) < sum(c * w for c, w in sizes) * SIZE
        assert "is missing" in str(error)
        return
    assert (slots.sum(axis=1) >= experts).all()
    assert (np.array(cluster.expert_bytes) @ slots <= memory).all()


def test_a_far_node_gets_no_expert_of_its_own_if_memory_allows_it():
    near = [Node(name=f"near-{n}", rtt_s=3e-4, tiers=(Tier(30 * SIZE, 4e10),)) for n in range(2)]
    far = Node(name="far", rtt_s=5e-3, tiers=(Tier(30 * SIZE, 4e10),))
    plan = make_plan(Cluster((far, *near), (SIZE,)), synthetic.trace(1, 48, 4, 12, 1), experts=48)
    assert all(plan.holders(0, expert) != [0] for expert in range(48))
    assert all(plan.holders(0, expert)[0] != 0 for expert in range(48))


def test_excluded_pinned_and_reserved_nodes():
    nodes = (
        Node(name="a", rtt_s=3e-4, tiers=(Tier(60 * SIZE, 4e10),), pinned=frozenset({(0, 7), (1, 3)})),
        Node(name="b", rtt_s=3e-4, tiers=(Tier(60 * SIZE, 4e10),), reserve_bytes=50 * SIZE),
        Node(name="c", rtt_s=0.0, tiers=(Tier(60 * SIZE, 4e11),), excluded=True),
    )
    plan = make_plan(Cluster(nodes, (SIZE,)), synthetic.trace(2, 24, 4, 12, 1), experts=24)
    holders = [[plan.holders(layer, expert) for expert in range(24)] for layer in range(2)]
    assert 0 in holders[0][7] and 0 in holders[1][3]
    assert not any(2 in nodes for layer in holders for nodes in layer)
    assert sum(1 in nodes for layer in holders for nodes in layer) <= 10


def test_the_coordinators_own_memory_makes_whole_layers_local_where_the_round_trip_decides():
    local = Node(name="coordinator", rtt_s=0.0, tiers=(Tier(48 * SIZE, 4e11),))
    others = [Node(name=f"n{i}", rtt_s=2e-3, tiers=(Tier(120 * SIZE, 4e10),)) for i in range(2)]
    plan = make_plan(Cluster((local, *others), (SIZE,)), synthetic.trace(4, 24, 4, 40, 3), (Mix(1),), experts=24)
    whole = [layer for layer in range(4) if all(plan.holders(layer, expert)[0] == 0 for expert in range(24))]
    assert len(whole) == 2  # as many as fit
    assert (plan.expected[whole, 0] < 1e-3).all()


def test_whole_layers_are_given_up_where_a_kind_of_batch_would_lose(monkeypatch):
    local = Node(name="coordinator", rtt_s=0.0, tiers=(Tier(72 * SIZE, 4e11),))
    others = [Node(name=f"n{i}", rtt_s=2e-3, tiers=(Tier(120 * SIZE, 4e10),)) for i in range(2)]
    cluster = Cluster((local, *others), (SIZE,))
    trace, mixes = synthetic.trace(6, 24, 4, 40, 3), (Mix(1), Mix(16))

    def whole():
        plan = make_plan(cluster, trace, mixes, experts=24)
        return sum(plan.slots[:, 0] == 24)

    monkeypatch.setattr(budget, "MOST_LOSS", 10.0)
    assert whole() > 0
    monkeypatch.setattr(budget, "MOST_LOSS", -1.0)
    assert whole() == 0


@given(tokens=st.integers(1, 60), size=st.integers(1, 16), count=st.integers(1, 40), seed=st.integers(0, 1000))
def test_batches_take_every_token_before_one_comes_twice(tokens, size, count, seed):
    # Each token is sent to an expert of its own, so that a batch's experts are its tokens.
    trace = Trace(np.arange(tokens, dtype=np.uint16)[None, :, None], np.arange(tokens, dtype=np.uint32) // 3)
    batches = sample(trace, [Mix(size)], [count], seed)[0]
    assert len(batches.mix) == count
    assert (np.diff(batches.offsets) == min(size, tokens)).all()
    each = max(1, tokens // size)
    assert np.bincount(batches.hits).max() <= -(-count // each)


def test_a_shared_expert_goes_where_it_is_faster():
    nodes = [
        {"name": "gpu", "mem_bytes": 60 * SIZE, "bw_Bps": 1e12, "rtt_s": 1e-5, "msg_s": 0},
        {"name": "box", "mem_bytes": 60 * SIZE, "bw_Bps": 2e10, "rtt_s": 1e-4, "msg_s": 0},
    ]
    trace = synthetic.trace(1, 24, 4, 12, 1)
    shared = {"bytes": 50 * SIZE, "bw_Bps": 2e10}
    quick = make_plan(parse_cluster({"nodes": nodes, "expert_bytes": SIZE, "shared": shared}), trace, experts=24)
    assert plan_json(quick)["layers"][0]["shared"] == 0
    shared = {"bytes": 100, "bw_Bps": 1e12}
    none = make_plan(parse_cluster({"nodes": nodes, "expert_bytes": SIZE, "shared": shared}), trace, experts=24)
    assert plan_json(none)["layers"][0]["shared"] is None


def test_a_plan_does_not_depend_on_the_threads():
    cluster, trace = synthetic.cluster("C", 24, 3, SIZE, 0.25), synthetic.trace(3, 24, 4, 12, 1)
    one, three = (make_plan(cluster, trace, seed=2, threads=threads, experts=24) for threads in (1, 3))
    assert np.array_equal(one.replicas, three.replicas)
    assert np.array_equal(one.expected, three.expected)


def test_some_of_the_batches_count_for_all():
    cluster, trace = synthetic.cluster("B", 24, 1, SIZE, 0.25), synthetic.trace(1, 24, 4, 12, 1)
    layer = search.prepare(cluster, trace, 24, (Mix(1), Mix(4)), 0, None, one_by_one)[0]
    some, weight = search._some(layer, 30)
    assert len(some.mix) == len(weight) == 30
    assert len(some.hits) == some.offsets[-1]
    assert np.bincount(some.mix, weights=weight) == pytest.approx(
        np.bincount(layer.batches.mix, weights=layer.weight)
    )
    assert search._some(layer, None)[0] is layer.batches


def test_sixty_four_nodes():
    nodes = tuple(
        Node(name=f"n{i:02}", rtt_s=(0.2 + 0.01 * i) * 1e-3, tiers=(Tier(4 * SIZE, 2e10 + 1e9 * i),))
        for i in range(64)
    )
    plan = make_plan(Cluster(nodes, (SIZE,)), synthetic.trace(1, 200, 8, 20, 1), experts=200)
    assert plan.bound_s <= plan.expected_s
    with pytest.raises(CoordinatorError, match="up to 64"):
        Cluster((*nodes, Node(name="more", rtt_s=0, tiers=(Tier(1, 1.0),))), (SIZE,))


def test_prefill_chunks_are_a_kind_of_batch():
    assert parse_mixes("1, 4,p256") == (Mix(1), Mix(4), Mix(256, True))
    for wrong in ("", "0", "1,1", "x", "p", "-4", "5000"):
        with pytest.raises(CoordinatorError):
            parse_mixes(wrong)
    plan = make_plan(
        synthetic.cluster("B", 24, 1, SIZE, 0.25), synthetic.trace(1, 24, 4, 12, 1), parse_mixes("1,p64"), experts=24
    )
    assert plan.expected[0, 1] > plan.expected[0, 0]


def test_files(tmp_path):
    trace = synthetic.trace(2, 24, 4, 12, 1)
    save_trace(trace, tmp_path / "t.npz")
    again = read_trace(tmp_path / "t.npz")
    assert (again.experts == trace.experts).all() and (again.seq == trace.seq).all()
    plan = make_plan(synthetic.cluster("B", 24, 2, SIZE, 0.5), again, experts=24)
    write_json(plan_json(plan), tmp_path / "p.json")
    found = json.loads((tmp_path / "p.json").read_text())
    assert [len(layer["replicas"]) for layer in found["layers"]] == [24, 24]
    assert found["bound_s"] <= found["expected_s"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"nodes": [], "expert_bytes": 1}', "at least one node"),
        ('{"nodes": [{"mem_bytes": 1, "bw_Bps": 0, "rtt_s": 0}], "expert_bytes": 1}', "bw_Bps"),
        ('{"nodes": [{"mem_bytes": -1, "bw_Bps": 1, "rtt_s": 0}], "expert_bytes": 1}', "mem_bytes"),
        ('{"nodes": [{"mem_bytes": 1, "bw_Bps": 1, "rtt": 0}], "expert_bytes": 1}', "unknown 'rtt'"),
        ('{"nodes": [{"mem_bytes": 1, "bw_Bps": 1, "rtt_s": NaN}], "expert_bytes": 1}', "rtt_s"),
    ],
)
def test_a_cluster_that_can_not_be_is_refused_in_words(tmp_path, text, said):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CoordinatorError, match=said):
        read_cluster(tmp_path / "c.json")


def test_a_trace_that_can_not_be_is_refused_in_words(tmp_path):
    with pytest.raises(CoordinatorError, match="can't be read"):
        read_trace(tmp_path / "none.npz")
    (tmp_path / "t.npz").write_bytes(b"nonsense")
    with pytest.raises(CoordinatorError, match="not a trace"):
        read_trace(tmp_path / "t.npz")
    np.savez(tmp_path / "u.npz", experts=np.zeros((1, 2, 3), np.uint16))
    with pytest.raises(CoordinatorError, match="no array 'seq'"):
        read_trace(tmp_path / "u.npz")
    with pytest.raises(CoordinatorError, match="any expert"):
        Trace(np.full((1, 2, 3), 0xFFFF, np.uint16), np.zeros(2, np.uint32))
    with pytest.raises(CoordinatorError, match="up to 4,096"):
        make_plan(
            synthetic.cluster("A", 8, 1, SIZE, 0), Trace(np.full((1, 2, 1), 9999, np.uint16), np.zeros(2, np.uint32))
        )
    with pytest.raises(CoordinatorError, match="uint16"):
        Trace(np.zeros((1, 2, 3), np.int64), np.zeros(2, np.uint32))  # type: ignore[arg-type]
