"""Large messages to several nodes leave one after the other where links are slow, and all others at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.dispatch.card import SURE, Card
from moehive.coordinator.dispatch.speed import LARGE_BYTES, LinkSpeed


def speed(slow: bool, s_per_byte: float = 8e-9) -> LinkSpeed:
    made = LinkSpeed(loopback=False)
    made.slow, made.s_per_byte = slow, s_per_byte
    return made


@given(st.lists(st.integers(LARGE_BYTES, 8 << 20), min_size=1, max_size=15), st.floats(0, 1e6))
def test_each_begins_when_those_before_it_have_nearly_left(sizes: list[int], now: float) -> None:
    card, slow, before = Card(), speed(True), 0.0
    for size in sizes:
        assert card.turn(slow, size, now) == pytest.approx(before, abs=1e-6)
        before += SURE * size * 8e-9


def test_a_card_that_nobody_uses_is_free_at_once() -> None:
    card = Card()
    assert card.turn(speed(True), 1 << 20, 5.0) == 0.0
    assert card.turn(speed(True), 1 << 20, 6.0) == 0.0


def test_small_messages_and_quick_links_wait_for_nobody() -> None:
    card = Card()
    card.turn(speed(True), 64 << 20, 5.0)
    assert card.turn(speed(True), LARGE_BYTES - 1, 5.0) == 0.0
    assert card.turn(speed(False), 64 << 20, 5.0) == 0.0
