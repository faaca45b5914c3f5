"""The choice of formats against trying every one of them."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.precision.knapsack import Option, choose

OPTIONS = st.lists(st.builds(Option, st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=4)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 200))
def test_bounds_and_best_choice(parts: list[list[Option]], budget: int) -> None:
    fitting = [
        sum(option.damage for option in picked)
        for picked in itertools.product(*parts)
        if sum(option.nbytes for option in picked) <= budget
    ]
    choice = choose(parts, budget)
    if not fitting:
        assert choice is None
        return
    assert choice is not None
    picked = [options[pick] for options, pick in zip(parts, choice.picks, strict=True)]
    assert sum(option.nbytes for option in picked) == choice.nbytes <= budget
    assert abs(sum(option.damage for option in picked) - choice.damage) < 1e-9
    assert choice.bound - 1e-9 <= min(fitting) <= choice.damage + 1e-9


@given(st.lists(OPTIONS, min_size=1, max_size=5))
def test_a_large_budget_takes_the_best_of_each(parts: list[list[Option]]) -> None:
    choice = choose(parts, 10_000)
    assert choice is not None
    best = sum(min(option.damage for option in options) for options in parts)
    assert abs(choice.damage - best) < 1e-9
    assert choice.bound == choice.damage


def test_many_equal_parts_leave_less_than_one_step() -> None:
    parts = [[Option(2, 1.0), Option(4, 0.1)]] * 1000
    choice = choose(parts, 3001)
    assert choice is not None
    assert choice.nbytes == 3000 and choice.damage - choice.bound <= 0.9 + 1e-9
