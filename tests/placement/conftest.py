"""Small made-up layers and the slow, obvious way to dispatch."""

from itertools import product

import numpy as np
import pytest

from moehive.coordinator.placement.native import LayerCosts
from moehive.coordinator.placement.traces import Batches


def finish(costs, place, load):
    if load == 0 and costs.always[place] == 0:
        return 0.0
    return costs.fixed[0, place] + costs.always[place] + load * costs.step[place]


def by_trying_all(costs, hits, replicas):
    """The least makespan over all ways to choose one replica for each expert."""
    places = len(costs.step)
    choices = [[p for p in range(places) if int(replicas[e]) >> p & 1] for e in hits]
    return min(
        max(finish(costs, p, chosen.count(p)) for p in range(places)) for chosen in map(list, product(*choices))
    )


def by_hall(costs, hits, replicas):
    """The least T such that no set of places must do more than it can by T."""
    places = len(costs.step)
    times = sorted({finish(costs, p, load) for p in range(places) for load in range(len(hits) + 1)})

    def room(place, t):
        loads = [load for load in range(len(hits) + 1) if finish(costs, place, load) <= t]
        return max(loads, default=-1)

    for t in times:
        rooms = [room(p, t) for p in range(places)]
        if min(rooms) < 0:
            continue  # what a place does in every batch takes longer
        if all(
            sum(int(replicas[e]) & ~subset == 0 for e in hits)
            <= sum(rooms[p] for p in range(places) if subset >> p & 1)
            for subset in range(1, 1 << places)
        ):
            return t
    raise AssertionError("no time suffices")


def random_layer(seed, experts, places, batches, most=None):
    """(costs, batches, replicas, slots) of one layer; each expert has a replica within the slots."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, (most or experts) + 1, size=batches)
    hits = [np.sort(random.choice(experts, size, replace=False)).astype(np.uint16) for size in sizes]
    offsets = np.concatenate([[0], np.cumsum([len(h) for h in hits])])
    costs = LayerCosts(
        random.choice([0.0, 0.1, 0.3, 1.0, 3.0], (1, places)),
        random.choice([0.05, 0.1, 0.2, 0.5], places),
        np.where(random.random(places) < 0.2, 0.3, 0.0),
    )
    replicas = np.zeros(experts, dtype=np.uint64)
    for expert in range(experts):
        for place in random.choice(places, random.integers(1, places + 1), replace=False):
            replicas[expert] |= np.uint64(1) << np.uint64(place)
    slots = np.array([np.count_nonzero(replicas >> np.uint64(p) & np.uint64(1)) for p in range(places)], np.int32)
    return costs, Batches(offsets, np.concatenate(hits), np.zeros(batches, np.int32)), replicas, slots


@pytest.fixture
def dispatch():
    """Helpers for makespans of small layers."""

    class Helpers:
        trying_all = staticmethod(by_trying_all)
        hall = staticmethod(by_hall)
        layer = staticmethod(random_layer)

    return Helpers
