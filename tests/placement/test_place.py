"""The running cluster's plan: for even use without traffic, by its traffic with it, within memory."""

from dataclasses import replace

import numpy as np
import pytest

from moehive.coordinator.placement import plan as planning
from moehive.coordinator.placement import search, synthetic
from moehive.coordinator.placement.place import USUAL_GPU_BANDWIDTH, Measured, better, place
from moehive.coordinator.types import LOCAL
from moehive.kernels.geometry import ExpertSpec, LayerGeometry

SPEC = ExpertSpec(hidden_size=64, intermediate_size=32, activation="silu", format="bf16")
LAYERS = [LayerGeometry(24, 4, SPEC)] * 2
TRACE = synthetic.trace(2, 24, 4, 24, 1)


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    monkeypatch.setattr(search, "MOVES", 20_000)
    monkeypatch.setattr(search, "FIT_BATCHES", {1: 60, 4: 40, 16: 20, 64: 10})
    monkeypatch.setattr(planning, "SCORE_BATCHES", {1: 60, 4: 40, 16: 20, 64: 10})


def held(plan, name):
    return sum(map(len, plan.slice_of(name))) * SPEC.nbytes


def test_with_traffic_a_quick_node_is_asked_for_more_and_hot_experts_have_replicas():
    capacities = {"quick": 60 * SPEC.nbytes, "slow": 60 * SPEC.nbytes}
    measured = {"quick": Measured(40e9, 1e-4), "slow": Measured(1e9, 1e-4)}
    plan = place(capacities, measured, LAYERS, TRACE, 5)
    assert plan.epoch == 5 and [len(layer) for layer in plan.owners] == [24, 24]
    assert all(held(plan, name) <= size for name, size in capacities.items())
    assert any(len(nodes) == 2 for layer in plan.owners for nodes in layer)
    load = np.bincount(TRACE.experts[0].ravel(), minlength=24)
    asked = [nodes[0] == "quick" for nodes in plan.owners[0]]
    assert load[asked].sum() > load.sum() / 2


def test_a_node_whose_gpu_computes_the_experts_is_quicker():
    assert Measured(10e9).read_speed(100) == 10e9
    assert Measured(10e9, vram_bytes=100).read_speed(100) == USUAL_GPU_BANDWIDTH
    assert Measured(10e9, vram_bytes=50).read_speed(100) == pytest.approx(2 / (1 / 10e9 + 1 / USUAL_GPU_BANDWIDTH))
    capacities = dict.fromkeys("ab", 60 * SPEC.nbytes)
    measured = {"a": Measured(10e9, 1e-6, vram_bytes=60 * SPEC.nbytes), "b": Measured(10e9, 1e-6)}
    on_cpu = replace(SPEC, format="q5_0")
    for trace in (None, TRACE):
        shares = []
        for spec in (SPEC, on_cpu):
            plan = place(capacities, measured, [LayerGeometry(24, 4, spec)] * 2, trace, 1)
            shares.append(sum(nodes[0] == "a" for layer in plan.owners for nodes in layer))
            assert spec is SPEC or not any(pins.in_vram != ((), ()) for pins in plan.pins.values())
        assert shares[0] > 40 > shares[1]  # of 48


def test_the_coordinators_own_memory_has_no_hop():
    capacities = {LOCAL: 25 * SPEC.nbytes, "far": 60 * SPEC.nbytes}  # not enough for a whole layer
    plan = place(capacities, {"far": Measured(10e9, 5e-3), LOCAL: Measured(10e9)}, LAYERS, TRACE, 1)
    load = np.bincount(TRACE.experts[0].ravel(), minlength=24)
    local = [LOCAL in nodes for nodes in plan.owners[0]]
    assert load[local].mean() > load.mean()


def test_nodes_have_room_for_both_plans_while_they_change_over():
    capacities = {"a": 30 * SPEC.nbytes, "b": 30 * SPEC.nbytes}
    before = place(capacities, {}, LAYERS, None, 1)
    for seed in range(3):
        measured = {"a": Measured(10e9 * (seed + 1), 1e-4), "b": Measured(5e9, 1e-4)}
        plan = place(capacities, measured, LAYERS, TRACE, 2, before)
        for name, size in capacities.items():
            both = [set(x) | set(y) for x, y in zip(plan.slice_of(name), before.slice_of(name), strict=True)]
            assert sum(map(len, both)) * SPEC.nbytes <= size


def test_a_better_plan_is_looked_for_within_memory_and_only_if_it_pays():
    capacities = {"quick": 80 * SPEC.nbytes, "slow": 80 * SPEC.nbytes}
    measured = {"quick": Measured(40e9, 1e-5), "slow": Measured(1e8, 1e-5)}
    even = place(capacities, {}, LAYERS, None, 1)
    plan = better(capacities, measured, LAYERS, TRACE, 2, even, steps_per_s=1000.0)
    assert plan is not None and plan.epoch == 2 and plan.pins == {}
    for name, size in capacities.items():
        both = sum(
            name in new or name in old
            for layer, present in zip(plan.owners, even.owners, strict=True)
            for new, old in zip(layer, present, strict=True)
        )
        assert both * SPEC.nbytes <= size
    assert better(capacities, measured, LAYERS, TRACE, 2, even, steps_per_s=1e-9) is None
    assert better({"quick": 80 * SPEC.nbytes}, measured, LAYERS, TRACE, 2, even, steps_per_s=10.0) is None
