"""The bench of the choice among replicas: its rows, and that the choice is better than chance."""

from moehive.coordinator.bench.dispatch import SHAPES, measure_dispatch


def test_the_choice_is_better_than_chance() -> None:
    rows = measure_dispatch()
    assert {(row["batch"], row["nodes"], row["holders"]) for row in rows} == {(b, *s) for b in (1, 16) for s in SHAPES}
    assert all(row["random_ratio"] > 1 and row["choice_us"] > 0 for row in rows)
