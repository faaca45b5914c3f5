"""Whether some layers should lie whole on the quickest place.

A layer that needs no other place skips their round trip altogether, so a slot there is worth more the fuller the
layer is: shared out evenly, such memory can do worst. The share of whole layers is tried at a few values, with short
searches on a few layers; the rest of the memory is shared out evenly.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..types import CoordinatorError
from .cluster import Cluster
from .native import makespans
from .search import Layer, begin, improve
from .slots import Slots, share_out

TRIALS = 4  # shares of whole layers that are tried, besides none
SAMPLE_LAYERS = 4
TRIAL_MOVES = 6000
LEAST_GAIN = 0.005  # of the cost: less is within the noise of such short searches

Map = Callable[[Callable[[int], float], Sequence[int]], list[float]]


def budget(cluster: Cluster, experts: int, layers: Sequence[Layer], seed: int, each: Map) -> Slots:
    """Slots [layers, places]. `each` maps a function over layers, perhaps in threads. Raises CoordinatorError."""
    counts = [experts] * len(layers)
    even = share_out(cluster, counts)
    sizes = sum(cluster.bytes_of(index) for index in range(len(layers)))
    place = int(np.argmin([_alone(layer0, experts) for layer0 in _places_of(layers[0])]))
    most = int(cluster.places[place].mem_bytes * len(layers) // max(1, sizes * experts))
    if most == 0 or len(cluster.places) == 1:
        return even
    picked = sorted({index * len(layers) // SAMPLE_LAYERS for index in range(SAMPLE_LAYERS)})
    whole = np.full(experts, np.uint64(1) << np.uint64(place))

    def cost_whole(index: int) -> float:
        return float(layers[index].weight @ makespans(layers[index].costs, layers[index].batches, whole))

    def cost_of(slots: Slots) -> list[float]:
        def one(index: int) -> float:
            first = begin(layers[index], slots[index])
            return improve(layers[index], slots[index], first, TRIAL_MOVES, seed)[1]

        return each(one, picked)

    alone = each(cost_whole, range(len(layers)))
    at_first = cost_of(even)
    best, best_slots = float(np.mean(at_first)), even
    # The layers that gain most by being whole.
    lean = np.interp(range(len(layers)), picked, at_first)
    order = np.argsort(np.asarray(alone) - lean, kind="stable")
    base = best
    for trial in sorted({-(-most * n // TRIALS) for n in range(1, TRIALS + 1)}):
        local = frozenset(order[:trial].tolist())
        rest = [index for index in range(len(layers)) if index not in local]
        try:
            slots = share_out(cluster, counts, (place, local))
        except CoordinatorError:
            break
        cost = sum(alone[index] for index in local)
        if rest:
            # Even slots of the rest on a sample of all layers: which of them are whole matters little for its cost.
            even_rest = slots[rest]
            sampled = each(
                lambda i, part=even_rest: improve(  # type: ignore[misc]
                    layers[i], part[i % len(part)], begin(layers[i], part[i % len(part)]), TRIAL_MOVES, seed
                )[1],
                picked,
            )
            cost += len(rest) * float(np.mean(sampled))
        cost /= len(layers)
        if cost < best and cost < base * (1 - LEAST_GAIN):
            best, best_slots = cost, slots
    return best_slots


def _places_of(layer: Layer) -> list[tuple[float, float]]:
    """(fixed, step) of each place, the kinds of batches taken together."""
    return list(zip(layer.costs.fixed.mean(axis=0).tolist(), layer.costs.step.tolist(), strict=True))


def _alone(place: tuple[float, float], experts: int) -> float:
    """Seconds in which a place would compute a batch of many experts by itself."""
    return place[0] + place[1] * min(experts, 32)
