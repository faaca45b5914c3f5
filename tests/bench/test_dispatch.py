"""The bench of the choice among replicas: its rows, and that the choice is better than chance."""

from moehive.coordinator.bench.dispatch import SHAPES, measure_dispatch


def test_the_choice_is_better_than_chance() -> None:
    rows = measure_dispatch()
    shapes = {(row["batch"], row["nodes"], row["holders"]) for row in rows}
    assert shapes == {(batch, *shape) for batch in (1, 16) for shape in SHAPES}
    assert all(row["random_ratio"] > 1 and row["choice_us"] > 0 and row["split_us"] > 0 for row in rows)
