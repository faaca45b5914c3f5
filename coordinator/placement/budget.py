"""Whether some layers should lie whole on the quickest place.

A layer that needs no other place skips their round trip altogether, so a slot there is worth more the fuller the
layer is: shared out evenly, such memory can do worst. Some numbers of whole layers are tried, with short searches on
a few layers; the rest of the memory is shared out evenly.
"""

from collections.abc import Sequence

import numpy as np

from ..types import CoordinatorError
from .cluster import Cluster
from .native import Floats, Replicas, makespans
from .search import Layer, begin, improve
from .slots import Slots, share_out
from .traces import Each

TRIALS = 4  # numbers of whole layers that are tried, besides none; between them costs are interpolated
SAMPLE_LAYERS = 4
TRIAL_MOVES = 12_000
LEAST_GAIN = 0.002  # of the cost: less is within the noise of such short searches
MOST_LOSS = 0.0075  # of any kind of batch: large ones lose by whole layers what single tokens gain


def budget(cluster: Cluster, experts: int, layers: Sequence[Layer], seed: int, each: Each) -> Slots:
    """Slots [layers, places]. Raises CoordinatorError."""
    count = len(layers)
    counts = [experts] * count
    even = share_out(cluster, counts)
    sizes = sum(cluster.bytes_of(index) for index in range(count))
    place = int(np.argmin([_alone(layer0, experts) for layer0 in _places_of(layers[0])]))
    most = int(cluster.places[place].mem_bytes * count // max(1, sizes * experts))
    if most == 0 or len(cluster.places) == 1:
        return even
    picked = sorted({index * count // SAMPLE_LAYERS for index in range(SAMPLE_LAYERS)})
    whole = np.full(experts, np.uint64(1) << np.uint64(place))

    def costs_lean(slots: Slots) -> Floats:
        """[picked, mixes] of searches with these slots, of any of the layers that are not whole."""

        def one(index: int) -> Floats:
            layer, mine = layers[index], slots[index % len(slots)]
            return _costs(layer, improve(layer, mine, begin(layer, mine), TRIAL_MOVES, seed)[0])

        return np.stack(each(one, picked))

    alone = np.stack(each(lambda index: _costs(layers[index], whole), range(count)))
    at_first = costs_lean(even)
    # The layers that gain most by being whole come first.
    usual = np.interp(range(count), picked, at_first.sum(axis=1))
    order = np.argsort(alone.sum(axis=1) - usual, kind="stable").tolist()
    tried, lean = [0], [at_first.mean(axis=0)]
    for trial in sorted({-(-most * n // TRIALS) for n in range(1, TRIALS + 1)}):
        local = frozenset(order[:trial])
        try:
            slots = share_out(cluster, counts, (place, local))
        except CoordinatorError:
            break
        rest = [index for index in range(count) if index not in local]
        tried.append(trial)
        lean.append(costs_lean(slots[rest]).mean(axis=0) if rest else at_first.mean(axis=0))
    best, chosen = float(lean[0].sum()) * (1 - LEAST_GAIN), 0
    for trial in range(1, tried[-1] + 1):
        between = np.array([np.interp(trial, tried, column) for column in np.array(lean).T])
        costs = (alone[order[:trial]].sum(axis=0) + (count - trial) * between) / count
        if (costs <= lean[0] * (1 + MOST_LOSS)).all() and costs.sum() < best:
            best, chosen = float(costs.sum()), trial
    return share_out(cluster, counts, (place, frozenset(order[:chosen]))) if chosen else even


def _costs(layer: Layer, replicas: Replicas) -> Floats:
    """What each kind of batch adds to a layer's cost [mixes]."""
    times = layer.weight * makespans(layer.costs, layer.batches, replicas)
    return np.bincount(layer.batches.mix, weights=times).astype(np.float64)


def _places_of(layer: Layer) -> list[tuple[float, float]]:
    """(fixed, step) of each place, the kinds of batches taken together."""
    return list(zip(layer.costs.fixed.mean(axis=0).tolist(), layer.costs.step.tolist(), strict=True))


def _alone(place: tuple[float, float], experts: int) -> float:
    """Seconds in which a place would compute a batch of many experts by itself."""
    return place[0] + place[1] * min(experts, 32)
