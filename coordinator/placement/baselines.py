"""Other ways to place experts, for comparison: all of one layer, all with the slots that the planner has.

EPLB follows the algorithm that DeepSeek published with its load balancer (github.com/deepseek-ai/EPLB), written anew:
replicate the expert with the highest load a replica until the slots are used up, then give replicas, heaviest first,
to the place with the least load that has a slot. It knows loads, not bandwidths or round trips.
"""

import numpy as np
import numpy.typing as npt

from .native import Floats, Replicas

Slots = npt.NDArray[np.int32]  # [places]


def random_plan(load: Floats, slots: Slots, seed: int = 0) -> Replicas:
    """Slots are filled at random; spare ones hold replicas of random experts."""
    random = np.random.default_rng(seed)
    return _deal(random.permutation(len(load)), random.permutation(np.repeat(np.arange(len(slots)), slots)))


def round_robin(load: Floats, slots: Slots) -> Replicas:
    """Experts in their order, places in theirs, as long as they have slots; then once more from the front."""
    turns = [(turn, place) for place in range(len(slots)) for turn in range(int(slots[place]))]
    return _deal(np.arange(len(load)), np.array([place for _, place in sorted(turns)]))


def equal_share(load: Floats, slots: Slots) -> Replicas:
    """Split by memory, each expert once, in order; spare memory stays empty."""
    experts = len(load)
    share = slots * experts / slots.sum()
    counts = np.minimum(share.astype(np.int64), slots)
    for place in np.lexsort((np.arange(len(slots)), counts - share))[: experts - int(counts.sum())]:
        counts[place] += 1
    owner = np.repeat(np.arange(len(slots)), counts)
    return (np.uint64(1) << owner.astype(np.uint64)).astype(np.uint64)


def eplb(load: Floats, slots: Slots) -> Replicas:
    """See the module's first lines. A replica is never put twice on one place."""
    experts, total = len(load), int(slots.sum())
    copies = np.ones(experts, dtype=np.int64)
    most = int(np.count_nonzero(slots))
    for _ in range(total - experts):
        each = np.where(copies < most, load / copies, -1.0)
        best = int(np.argmax(each))
        if each[best] < 0:
            break
        copies[best] += 1
    replicas = np.zeros(experts, dtype=np.uint64)
    free, busy = slots.astype(np.int64), np.zeros(len(slots))
    each = load / copies
    for expert in np.lexsort((np.arange(experts), -each)):
        for copy in range(int(copies[expert])):
            has = (replicas[expert] >> np.arange(len(slots), dtype=np.uint64)) & np.uint64(1) != 0
            open_ = (free > 0) & ~has
            if not open_.any():
                if copy:
                    break  # this replica finds no place; its expert has others
                raise AssertionError("there are as many slots as replicas")
            place = int(np.argmin(np.where(open_, busy, np.inf)))
            replicas[expert] |= np.uint64(1) << np.uint64(place)
            free[place] -= 1
            busy[place] += each[expert]
    return replicas


def _deal(order: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> Replicas:
    """Experts in `order`, again and again, to `places`; an expert that a place has already is passed over."""
    replicas = np.zeros(len(order), dtype=np.uint64)
    next_ = 0
    for turn, place in enumerate(places):
        bit = np.uint64(1) << np.uint64(place)
        if turn < len(order):
            replicas[order[turn]] |= bit
            continue
        for _ in range(len(order)):
            expert = order[next_ % len(order)]
            next_ += 1
            if not replicas[expert] & bit:
                replicas[expert] |= bit
                break
    return replicas
