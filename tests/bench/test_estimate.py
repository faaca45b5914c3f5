"""What `moehive bench estimate` gives a node of the memory that all share, by hand."""

import pytest

from moehive.coordinator.bench.estimate import NODES, _beside, _Speeds
from moehive.coordinator.estimate.geometries import MODELS
from moehive.coordinator.estimate.model import of_shape
from moehive.coordinator.estimate.step import distinct


def speeds(by_nodes: float, by_one: float) -> _Speeds:
    return _Speeds(50e9, by_nodes, by_one, 1e11, 1e11, 1.0)


def test_nodes_share_what_memory_gives() -> None:
    known = of_shape("m", MODELS["qwen3-30b"], "q8_0")  # without a shared expert
    layer = known.layers[0]
    slowest = distinct(layer, [1] * NODES, 1).max(1).mean() / layer.top_k
    assert 0.5 < slowest < 1
    assert _beside(known, speeds(30e9, 15e9)) == pytest.approx(15e9)  # one alone is no quicker
    # Where one alone reads as fast as both, all is read at that speed, and the slowest is done last.
    assert _beside(known, speeds(30e9, 30e9)) == pytest.approx(slowest * 30e9)
    assert 15e9 < _beside(known, speeds(30e9, 20e9)) < slowest * 30e9


def test_a_shared_expert_is_read_from_the_same_memory() -> None:
    known = of_shape("m", MODELS["kimi-k2"], "q8_0")
    layer = known.layers[0]
    active = layer.top_k * layer.nbytes / layer.experts
    slowest = distinct(layer, [1] * NODES, 1).max(1).mean() / layer.top_k
    took = slowest * active / _beside(known, speeds(30e9, 30e9))
    assert took == pytest.approx((active + known.shared_bytes_a_layer) / 30e9)
