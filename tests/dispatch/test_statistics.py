"""Routing statistics: what is kept, what is bounded, what decays, and what damaged files are answered with."""

import contextlib

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.dispatch import statistics
from moehive.coordinator.dispatch.statistics import NO_EXPERT, Pass, RoutingStatistics, passing
from moehive.coordinator.types import CoordinatorError


def note(found, sequences, ids):
    """One pass: `ids` [layers][tokens][top_k]."""
    passing.set(Pass(sequences))
    for layer, rows in enumerate(ids):
        found.note(layer, np.array(rows, dtype=np.int64))
    passing.set(None)


def test_a_prompt_and_its_tokens_are_one_sequence_and_others_are_others():
    found = RoutingStatistics([4, 4], 2)
    note(found, [(11, 2)], [[[0, 1], [2, 3]], [[1, 0], [3, 2]]])
    note(found, [(11, 1), (12, 1)], [[[0, 2], [1, 3]], [[0, 3], [1, 2]]])
    note(found, [(11, 2)], [[[0, 1], [0, 1]], [[0, 1], [0, 1]]])  # a new sequence in the old one's cache
    experts, seq = found.trace()
    assert seq.tolist() == [0, 0, 0, 1, 2, 2]
    assert experts[0].tolist() == [[0, 1], [2, 3], [0, 2], [1, 3], [0, 1], [0, 1]]
    assert experts[1, 2].tolist() == [0, 3]
    assert found.counts(0).round(3).tolist() == [4.0, 4.0, 2.0, 2.0]


def test_ids_outside_the_layer_mean_none():
    found = RoutingStatistics([4, 6], 2)
    note(found, [(1, 1)], [[[-1, 3]], [[5, 6]]])
    experts, _ = found.trace()
    assert experts[:, 0].tolist() == [[NO_EXPERT, 3], [5, NO_EXPERT]]
    assert found.counts(1).tolist() == [0, 0, 0, 0, 0, 1]


def test_a_pass_that_was_broken_off_or_not_announced_is_not_kept():
    found = RoutingStatistics([4, 4], 1)
    found.note(0, np.array([[1]]))
    passing.set(Pass([(1, 1)]))
    found.note(0, np.array([[1]]))
    passing.set(None)
    note(found, [(1, 1)], [[[2]], [[3]]])
    assert found.trace()[0].tolist() == [[[2]], [[3]]]


def test_it_is_bounded_and_old_counts_fade(monkeypatch):
    monkeypatch.setattr(statistics, "KEPT_TOKENS", 100)
    monkeypatch.setattr(statistics, "HALF_LIFE_TOKENS", 50)
    found = RoutingStatistics([4], 1)
    for turn in range(300):
        note(found, [(1, 1)], [[[0 if turn < 150 else 1]]])
    experts, seq = found.trace()
    assert experts.shape == (1, 100, 1) and len(seq) == 100
    assert found.counts(0)[1] / found.counts(0)[0] == pytest.approx(8, rel=0.01)  # three half-lives
    note(found, [(2, 5000)], [np.zeros((5000, 1), dtype=int)])
    assert found.trace()[0].shape[1] == statistics.PASS_TOKENS


def test_it_comes_back_as_it_was():
    found = RoutingStatistics([5, 5, 5], 2)
    random = np.random.default_rng(1)
    for turn in range(20):
        note(found, [(turn % 3, 2)], random.integers(0, 5, (3, 2, 2)))
    again = RoutingStatistics.restore(found.packed())
    assert all((a == b).all() for a, b in zip(again.trace(), found.trace(), strict=True))
    assert again.counts(1) == pytest.approx(found.counts(1), rel=1e-5)
    assert again.tokens == found.tokens
    assert set(msgpack.unpackb(found.packed())) == {
        "version", "experts_per_layer", "top_k", "tokens", "counts", "experts", "seq",
    }  # fmt: skip


@given(st.binary(max_size=200))
def test_damage_is_said_in_words(damage):
    with pytest.raises(CoordinatorError, match="can't be read"):
        RoutingStatistics.restore(damage)
    whole = RoutingStatistics([5], 2).packed()
    broken = whole[: len(whole) // 2] + damage
    with contextlib.suppress(CoordinatorError):  # anything else is a bug
        RoutingStatistics.restore(broken)
