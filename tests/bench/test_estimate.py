"""What `moehive bench estimate` gives a node of the memory that all share, by hand, and which moments it compares."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moehive.coordinator.bench import estimate
from moehive.coordinator.bench.decode import DecodeSettings, Round
from moehive.coordinator.bench.estimate import NODES, _beside, _figures, _Speeds
from moehive.coordinator.estimate.geometries import MODELS
from moehive.coordinator.estimate.model import of_shape
from moehive.coordinator.estimate.step import distinct


def speeds(by_nodes: float, by_one: float) -> _Speeds:
    return _Speeds(50e9, by_nodes, by_one, 1e11, 1e11, 1e11, 1e11, 1.0)


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


def test_a_round_is_compared_with_the_speeds_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory gives more in some seconds than in others, to the estimate and to what is measured alike."""
    moments = [speeds(by, 20e9)._replace(read=by) for by in (30e9, 30e9, 50e9, 50e9, 30e9)]
    between = [30e9, 40e9, 50e9, 40e9]
    known = of_shape("qwen3-30b", MODELS["qwen3-30b"], "q8_0", 6, 16, 4096)
    rounds = [Round(first=0.5, token=0.6e9 / by, submit=0.1e9 / by, waiting=0.2e9 / by) for by in between]

    def measure(settings: DecodeSettings, beside: Callable[[Round | None], None]) -> None:
        for done in (None, *rounds):
            beside(done)

    given = iter(moments)
    monkeypatch.setattr(estimate, "measure_decode", measure)
    monkeypatch.setattr(_Speeds, "measure", lambda: next(given))
    row = estimate._row(known, Path("model"), Path("state"), quick=False)
    alone = [speeds(by, 20e9)._replace(read=by) for by in between]
    ratios = sorted(_figures(known, *each, 128)["ratio"] for each in zip(rounds, alone, strict=True))
    assert row["ratio"] == pytest.approx((ratios[1] + ratios[2]) / 2)
    assert row["measured_tokens_per_s"] == pytest.approx(40e9 / 0.6e9)
    assert row["measured_trunk_ms"] == pytest.approx(0.3e9 / 40e9 * 1e3)
    assert row["estimated_tokens_per_s"] == pytest.approx(row["ratio"] * row["measured_tokens_per_s"])
    assert row["measured_prefill_tokens_per_s"] == 256
