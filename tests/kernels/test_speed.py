"""What is timed as this machine's speed: the bytes and the products that a call is said to have."""

from typing import Any

import numpy as np
import pytest

from moehive.kernels import speed
from moehive.kernels.native import NativeExperts

ROW_BYTES = 2048 // 32 * 34  # q8_0: 32 numbers of a byte and a scale of two
PACKED_BYTES = 2048 // 256 * 144  # q4_k: 256 numbers of half a byte, scales of 12 bytes and two of theirs
WEIGHTS = 3 * 2048 * 512


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[int], bool]]:
    """Each call's format, tokens, experts' addresses, whether all results were zero; it takes 4, 1, 2 seconds."""
    found: list[tuple[str, int, list[int], bool]] = []
    layer = NativeExperts.layer

    def watched(self: NativeExperts, *given: Any, **more: Any) -> Any:
        spec, hidden, offsets, addresses, _ = given
        assert offsets.tolist() == list(range(0, len(addresses) + 1, len(addresses) // len(hidden)))
        rows = layer(self, *given, **more)
        found.append((spec.format, len(hidden), list(addresses), not rows.any()))
        return rows

    def timed(work: Any) -> list[float]:
        work()
        return [4.0, 1.0, 2.0]

    monkeypatch.setattr(NativeExperts, "layer", watched)
    monkeypatch.setattr(speed, "_timed", timed)
    return found


def test_reading_counts_each_expert_once(asked: list[tuple[str, int, list[int], bool]]) -> None:
    nbytes = 2 * speed.reading(2)  # the median of the times
    ((format, tokens, addresses, zero),) = asked
    expert = WEIGHTS * ROW_BYTES // 2048
    assert (format, tokens, nbytes, zero) == ("q8_0", 1, len(addresses) * expert, True)
    assert np.diff(addresses).min() >= expert  # none lies in another
    assert nbytes > 60 << 20  # more than most caches hold


def test_multiplying_counts_each_token(asked: list[tuple[str, int, list[int], bool]]) -> None:
    products = speed.multiplying(1)  # by the shortest
    ((format, tokens, addresses, _),) = asked
    assert format == "q8_0" and tokens > 32 and len(set(addresses)) == 1 and len(addresses) == tokens
    assert products == tokens * WEIGHTS


def test_multiplying_one_is_of_a_few_packed_experts(asked: list[tuple[str, int, list[int], bool]]) -> None:
    products = speed.multiplying_one(1)  # by the shortest
    ((format, tokens, addresses, _),) = asked
    expert = WEIGHTS * PACKED_BYTES // 2048
    assert (format, tokens) == ("q4_k", 1) and len(addresses) * expert < 4 << 20  # the last cache of most processors
    assert products == len(set(addresses)) * WEIGHTS and np.diff(addresses).min() >= expert


def test_some_passes_are_timed() -> None:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1

    taken = speed._timed(work)
    assert calls == len(taken) + 1 > speed._LEAST_PASSES and min(taken) >= 0


def test_all_are_plausible() -> None:
    assert 1e8 < speed.reading(1) < 1e13
    assert 1e8 < speed.multiplying(1) < 1e15
    assert 1e8 < speed.multiplying_one(1) < 1e15
