"""The simulation of machines that come and go, where theory says what must come out."""

from math import exp

import numpy as np
import pytest

from moehive.coordinator.bench import internet


@pytest.fixture
def one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAYERS", "EXPERTS", "TOP_K"):
        monkeypatch.setattr(internet, name, 1)
    monkeypatch.setattr(internet, "DAYS", 4000)


def test_an_expert_with_one_holder_is_there_while_that_is_on(one_expert: None) -> None:
    found = internet._failures(1, 1, np.random.default_rng(0))
    share = internet.SESSION_S / (internet.SESSION_S + internet.PAUSE_S)
    assert found.whole == pytest.approx(share, rel=0.03)
    assert found.token == pytest.approx(found.whole)
    assert found.copied_bytes_per_s == 0  # there is nobody to copy from or to
    assert found.longest_s > internet.PAUSE_S


def test_machines_that_stay_on_lose_nothing(one_expert: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internet, "SESSION_S", 1e15)
    assert internet._failures(5, 2, np.random.default_rng(0)) == internet.Outcome(1.0, 1.0, 0.0, 0.0)


def test_repairs_keep_an_expert_that_would_else_be_lost(one_expert: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internet, "DAYS", 2000)  # of 30 machines
    repaired = internet._failures(30, 2, np.random.default_rng(0))
    monkeypatch.setattr(internet, "NOTICE_S", 1e15)
    left = internet._failures(30, 2, np.random.default_rng(0))
    share = internet.SESSION_S / (internet.SESSION_S + internet.PAUSE_S)
    assert left.whole == pytest.approx(1 - (1 - share) ** 2, rel=0.03)  # two machines, each on by itself
    assert repaired.whole > 0.99 and repaired.copied_bytes_per_s > 0 == left.copied_bytes_per_s


def test_one_expert_takes_the_mean_round_trip(one_expert: None) -> None:
    mean = internet.RTT_MEDIAN_S * exp(internet.RTT_SPREAD**2 / 2)  # of a log-normal
    seconds = internet._layer_seconds(1, np.random.default_rng(0))
    assert seconds == pytest.approx(mean + internet.EXPERT_BYTES / internet.BANDWIDTH_BPS, rel=0.05)
