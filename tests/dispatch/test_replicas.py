"""Choosing among replicas: always a holder, hardly ever worse than the best, and quick."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.dispatch.replicas import Holders

NODES = 4
nodes = st.lists(st.integers(0, NODES - 1), max_size=3, unique=True)
costs = st.lists(st.floats(0.1, 5.0), min_size=NODES, max_size=NODES)


def holders_of(lists: list[list[int]], count: int = NODES) -> Holders:
    rows = [[*nodes, *[-1] * (3 - len(nodes))] for nodes in lists]
    return Holders(np.array(rows, dtype=np.int32), count)


def makespan(chosen: list[int], sizes: list[int], base: list[float], per: list[float]) -> float:
    finish = dict[int, float]()
    for node, size in zip(chosen, sizes, strict=True):
        finish[node] = finish.get(node, base[node]) + per[node] * size
    return max(finish.values(), default=0.0)


@given(st.lists(nodes, min_size=1, max_size=6), costs, costs, st.booleans(), st.data())
def test_each_expert_goes_to_a_holder_and_the_layer_ends_soon(
    lists: list[list[int]], base: list[float], per: list[float], by_pairs: bool, data: st.DataObject
) -> None:
    # -1 and ids beyond the experts mean none.
    ids = data.draw(st.lists(st.integers(-1, len(lists)), min_size=1, max_size=12))
    owner = holders_of(lists).choose(np.array([ids]), by_pairs, base, per).tolist()
    assert all(node in nodes if nodes else node == -1 for node, nodes in zip(owner, lists, strict=True))
    named = [expert for expert, nodes in enumerate(lists) if nodes and expert in ids]
    sizes = [ids.count(expert) if by_pairs else 1 for expert in named]
    ours = makespan([owner[expert] for expert in named], sizes, base, per)
    best = min(makespan(list(other), sizes, base, per) for other in product(*(lists[e] for e in named)))
    assert ours <= 2 * best * (1 + 1e-9)


def test_a_slow_replica_is_left_alone() -> None:
    holders, ids = holders_of([[0, 1]] * 6), np.arange(6)[None]
    assert holders.choose(ids, False, [0.0] * 4, [1.0, 100.0, 1.0, 1.0]).tolist() == [0] * 6
    spread = holders.choose(ids, False, [0.0] * 4, [1.0] * 4)
    assert sorted(spread.tolist()) == [0, 0, 0, 1, 1, 1]


def test_the_augmenting_pass_passes_an_expert_on() -> None:
    # Greedy by fewest holders gives node 1 the second and third; the third can move on to node 2 alone.
    lists, base, per = [[0], [0, 1], [1, 2], [1, 2]], [0.0, 0.0, 2.0], [1.0, 1.0, 0.5]
    chosen = holders_of(lists, 3).choose(np.arange(4)[None], False, base, per).tolist()
    assert makespan(chosen, [1] * 4, base, per) == min(
        makespan(list(other), [1] * 4, base, per) for other in product(*lists)
    )


def test_experts_of_many_pairs_are_kept_apart() -> None:
    ids = np.array([[0, 0, 0, 1, 1, 1, 2, 3]])
    owner = holders_of([[0, 1]] * 4).choose(ids, True, [0.0] * 4, [1.0] * 4).tolist()
    assert sorted([owner[0], owner[1]]) == [0, 1] and sorted([owner[2], owner[3]]) == [0, 1]
