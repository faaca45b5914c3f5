"""Choosing among replicas: always a holder, hardly ever worse than the best, and quick."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.dispatch.replicas import choose

NODES = 4
nodes = st.lists(st.integers(0, NODES - 1), min_size=1, max_size=3, unique=True)
costs = st.lists(st.floats(0.1, 5.0), min_size=NODES, max_size=NODES)


def makespan(chosen: list[int], sizes: list[float], base: list[float], per: list[float]) -> float:
    finish = dict[int, float]()
    for node, size in zip(chosen, sizes, strict=True):
        finish[node] = finish.get(node, base[node]) + per[node] * size
    return max(finish.values())


@given(st.lists(nodes, min_size=1, max_size=6), costs, costs, st.data())
def test_each_expert_goes_to_a_holder_and_the_layer_ends_soon(
    holders: list[list[int]], base: list[float], per: list[float], data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.floats(0.5, 4.0), min_size=len(holders), max_size=len(holders)))
    chosen = choose(holders, sizes, base, per)
    assert all(node in nodes for node, nodes in zip(chosen, holders, strict=True))
    best = min(makespan(list(other), sizes, base, per) for other in product(*holders))
    assert makespan(chosen, sizes, base, per) <= 2 * best * (1 + 1e-9)


def test_a_slow_replica_is_left_alone() -> None:
    holders = [[0, 1]] * 6
    assert choose(holders, [1.0] * 6, [0.0, 0.0], [1.0, 100.0]) == [0] * 6
    spread = choose(holders, [1.0] * 6, [0.0, 0.0], [1.0, 1.0])
    assert sorted(spread) == [0, 0, 0, 1, 1, 1]


def test_the_augmenting_pass_passes_an_expert_on() -> None:
    # Greedy by fewest holders gives node 1 the second and third; the third can move on to node 2 alone.
    holders = [[0], [0, 1], [1, 2], [1, 2]]
    chosen = choose(holders, [1.0] * 4, [0.0, 0.0, 2.0], [1.0, 1.0, 0.5])
    assert makespan(chosen, [1.0] * 4, [0.0, 0.0, 2.0], [1.0, 1.0, 0.5]) == min(
        makespan(list(other), [1.0] * 4, [0.0, 0.0, 2.0], [1.0, 1.0, 0.5]) for other in product(*holders)
    )
