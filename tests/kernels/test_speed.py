"""What is timed as this machine's speed: the bytes and the products that a call is said to have."""

from typing import Any

import numpy as np
import pytest

from moehive.kernels import speed
from moehive.kernels.native import NativeExperts

ROW_BYTES = 2048 // 32 * 34  # q8_0: 32 numbers of a byte and a scale of two
WEIGHTS = 3 * 2048 * 512


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int], bool]]:
    """Each call's tokens, experts' addresses, whether its results were zero; calls seem to take 4, 1, 2 seconds."""
    found: list[tuple[int, list[int], bool]] = []
    layer = NativeExperts.layer

    def watched(self: NativeExperts, *given: Any, **more: Any) -> Any:
        _, hidden, offsets, addresses, _ = given
        assert offsets.tolist() == list(range(0, len(addresses) + 1, len(addresses) // len(hidden)))
        rows = layer(self, *given, **more)
        found.append((len(hidden), list(addresses), not rows.any()))
        return rows

    def timed(work: Any) -> list[float]:
        work()
        return [4.0, 1.0, 2.0]

    monkeypatch.setattr(NativeExperts, "layer", watched)
    monkeypatch.setattr(speed, "_timed", timed)
    return found


def test_reading_counts_each_expert_once(asked: list[tuple[int, list[int], bool]]) -> None:
    nbytes = 2 * speed.reading(2)  # the median of the times
    ((tokens, addresses, zero),) = asked
    expert = WEIGHTS * ROW_BYTES // 2048
    assert (tokens, nbytes, zero) == (1, len(addresses) * expert, True)
    assert np.diff(addresses).min() >= expert  # none lies in another
    assert nbytes > 60 << 20  # more than most caches hold


def test_multiplying_counts_each_token(asked: list[tuple[int, list[int], bool]]) -> None:
    products = speed.multiplying(1)  # by the shortest
    ((tokens, addresses, _),) = asked
    assert tokens > 32 and len(set(addresses)) == 1 and len(addresses) == tokens
    assert products == tokens * WEIGHTS


def test_some_passes_are_timed() -> None:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1

    taken = speed._timed(work)
    assert calls == len(taken) + 1 > speed._LEAST_PASSES and min(taken) >= 0


def test_both_are_plausible() -> None:
    assert 1e8 < speed.reading(1) < 1e13
    assert 1e8 < speed.multiplying(1) < 1e15
