"""Which of its holders computes each expert of a layer: the one that would finish first, then one augmenting pass.

Numbers only, plain lists: a decode step has some ten experts, and numpy's calls would cost more than the work.
The rule is research's (greedy by least finish time is within a few percent of the exact answer; the pass that follows
takes most of the rest). With 8 nodes and up to 3 holders for each expert: 7 µs for 10 experts, some 90 µs for 100
(`moehive bench dispatch`, on one shared Zen 3 core).
"""

from collections.abc import Sequence

MOVES = 8  # of the augmenting pass, at most; each takes one expert off the node that would finish last


def choose(
    holders: Sequence[Sequence[int]], sizes: Sequence[float], base: Sequence[float], per: Sequence[float]
) -> list[int]:
    """A node for each expert of a layer.

    `holders[i]` are the nodes that hold the i-th expert (one at least), `sizes[i]` what it costs there in units of
    `per`; a node that is used finishes `base` (round trip, work in hand) plus `per` times its experts' sizes after
    the start, seconds. The largest finish is what is kept small.
    """
    finish = list(base)
    chosen = [0] * len(holders)
    free: list[tuple[int, float, int]] = []  # those with a choice: fewest holders first, then the largest
    for i, nodes in enumerate(holders):
        if len(nodes) == 1:
            node = nodes[0]
            chosen[i] = node
            finish[node] += per[node] * sizes[i]
        else:
            free.append((len(nodes), -sizes[i], i))
    if not free:
        return chosen
    free.sort()
    for _, _, i in free:
        size = sizes[i]
        best, soonest = -1, 0.0
        for node in holders[i]:
            end = finish[node] + per[node] * size
            if best < 0 or end < soonest:
                best, soonest = node, end
        chosen[i] = best
        finish[best] = soonest
    _augment(holders, sizes, per, chosen, finish, [i for _, _, i in free])
    return chosen


def _augment(
    holders: Sequence[Sequence[int]],
    sizes: Sequence[float],
    per: Sequence[float],
    chosen: list[int],
    finish: list[float],
    free: list[int],
) -> None:
    """Takes experts off the last node: to another holder, or to one that passes one of its own on in exchange."""
    for _ in range(MOVES):
        last = max(set(chosen), key=finish.__getitem__)
        limit = finish[last]
        if not _move(holders, sizes, per, chosen, finish, free, last, limit):
            return


def _move(
    holders: Sequence[Sequence[int]],
    sizes: Sequence[float],
    per: Sequence[float],
    chosen: list[int],
    finish: list[float],
    free: list[int],
    last: int,
    limit: float,
) -> bool:
    least = min(sizes)
    room = {node for node, end in enumerate(finish) if node != last and end + per[node] * least < limit}
    if not room:
        return False  # the usual end
    mine = [i for i in free if chosen[i] == last]
    for i in mine:
        for node in holders[i]:
            if node in room and finish[node] + per[node] * sizes[i] < limit:
                _shift(i, node, sizes, per, chosen, finish)
                return True
    seen: set[tuple[int, float]] = set()  # nodes in between that were looked at for an expert of this size
    for i in mine:
        for node in holders[i]:
            if node == last or (node, sizes[i]) in seen:
                continue
            seen.add((node, sizes[i]))
            end = finish[node] + per[node] * sizes[i]
            for j in free:
                if chosen[j] != node or end - per[node] * sizes[j] >= limit:
                    continue
                for third in holders[j]:
                    if third != node and third in room and finish[third] + per[third] * sizes[j] < limit:
                        _shift(j, third, sizes, per, chosen, finish)
                        _shift(i, node, sizes, per, chosen, finish)
                        return True
    return False


def _shift(
    i: int, node: int, sizes: Sequence[float], per: Sequence[float], chosen: list[int], finish: list[float]
) -> None:
    finish[chosen[i]] -= per[chosen[i]] * sizes[i]
    finish[node] += per[node] * sizes[i]
    chosen[i] = node
