"""A lower bound: seconds that no plan for this cluster can go below on these batches, however clever.

Two proofs, the better of which counts for each kind of batch:

*Free placement.* Were every expert on every place, a batch of d distinct experts would still take `time_for(d)`.

*Memory.* Take a set S of places, say the slow ones. At most M experts of a layer have a replica outside S, as many as
fit there; call them X. A batch whose hits D are not all in X leaves |D \\ X| experts that only S can compute, so it
takes at least ψ = time of S for |D \\ X|. The mean of ψ over the batches has to be bounded over *every* X of M
experts. With h = |D ∩ X| and any numbers β and γ,

    mean ψ(d, h) >= mean min_h [ψ(d, h) + β h + γ h(h-1)/2] - max over X of [β Σ w_e + γ Σ w_ef]

where w_e is how often e is hit and w_ef how often e and f are hit together. The last maximum is at most the sum of
the M largest of β w_e + γ/2 × (sum of the M-1 largest w_ef of that e). β and γ are searched for; each gives a valid
bound. The pair term is what says that no X can hold all experts of many batches at once, which decides small batches.
The same holds with a β_e for each expert and the β_e of D ∩ X in place of β h, the minimum then being over all parts
of D, and the h cheapest being the least of those with h experts. These are found by steps along the supergradient.

Two sets S and T prove more than the better of them: a batch takes at least the larger of their ψ, one says that it
leaves the fast places at all, the other that it then waits for a slow one. Each has its X, its h and its multipliers;
the minimum is over both h, and where S lies within T, h of S is not below h of T.

Memory may be shared out unevenly over the layers: with a price for a byte outside S, each layer takes what is
cheapest for it, and the sum less the price of all bytes is a bound for any sharing out (Lagrange).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .bound_layer import LayerHits, Multipliers, SetTimes
from .cluster import Cluster
from .makespan import layer_costs, time_for
from .native import Floats
from .traces import Batches, Mix

MOST_SETS = 256  # that are looked at, of those that mean loads make look best
PARTNERS = 64  # sets that are tried beside the best one
FINEST = 6  # rounds of the search for multipliers that all experts share, on the first layer
FIRST_STEPS, STEPS = 100, 12  # for prices of each expert's own: on the first layer; on the others, from there


class Bounds(NamedTuple):
    """Seconds [mixes] of all layers together."""

    any_plan: Floats  # however memory is shared out over the layers
    same_slots: Floats  # for plans that give each layer as many slots on each place as this one does


def lower_bounds(
    cluster: Cluster,
    mixes: Sequence[Mix],
    batches: Sequence[Batches],
    experts: int,
    slots: npt.NDArray[np.int32],
    threads: int = 1,
) -> Bounds:
    """Both bounds for `batches` [layers], those that a plan with `slots` [layers, places] is scored on."""
    usable = np.array([place.mem_bytes for place in cluster.places]) >= min(cluster.expert_bytes)
    costs = [layer_costs(cluster, layer, mixes) for layer in range(len(batches))]
    any_plan, same_slots = np.zeros(len(mixes)), np.zeros(len(mixes))
    with ThreadPoolExecutor(threads) as pool:
        for mix in range(len(mixes)):

            def count(layer: int, mix: int = mix) -> LayerHits:
                return LayerHits.of(costs[layer], mix, batches[layer], experts, usable)

            layers = list(pool.map(count, range(len(batches))))
            any_plan[mix] = same_slots[mix] = sum(float(layer.free.mean()) for layer in layers)
            sets, multipliers = _proof(layers[0], usable, slots.mean(axis=0).astype(np.int32))
            if sets:
                same = _same_slots(sets, multipliers, usable, layers, slots, pool)
                either = _any_plan(cluster, sets[0], multipliers[0], usable, layers, pool)
                any_plan[mix], same_slots[mix] = max(any_plan[mix], either), max(same_slots[mix], same)
    return Bounds(any_plan, np.maximum(any_plan, same_slots))


def _proof(
    layer: LayerHits, usable: npt.NDArray[np.bool_], slots: npt.NDArray[np.int32]
) -> tuple[list[SetTimes], list[Multipliers]]:
    """The best set of places alone, and the one that proves most with it, if it does; none where none proves much."""
    tried = [layer.at(inside, usable, _room(slots, inside, layer.experts)) for inside in _sets(layer, usable, slots)]
    alone = sorted(
        ((layer.search([one], rounds=1)[0], i) for i, one in enumerate(tried)), key=lambda e: (-e[0], e[1])
    )
    if not alone:
        return [], []
    refined = [([tried[i]], *layer.search([tried[i]], rounds=FINEST)) for _, i in alone[:4]]
    sets, value, multipliers = max(refined, key=lambda entry: entry[1])
    if layer.can_pair():
        pairs = [[sets[0], tried[i]] for _, i in alone[:PARTNERS] if tried[i] is not sets[0]]
        found = [(layer.search(pair, multipliers, rounds=1)[0], -i) for i, pair in enumerate(pairs)]
        if found and (best := max(found))[0] > value:
            pair = pairs[-best[1]]
            return pair, layer.search(pair, multipliers, rounds=FINEST)[1]
    return sets, multipliers


def _bytes_outside(cluster: Cluster, outside: npt.NDArray[np.bool_]) -> int:
    """Bytes that experts can take there: whole experts, where all have one size."""
    sizes = set(cluster.expert_bytes)
    unit = sizes.pop() if len(sizes) == 1 else 1
    return sum(p.mem_bytes // unit * unit for p, out in zip(cluster.places, outside, strict=True) if out)


def _room(slots: npt.NDArray[np.int32], inside: npt.NDArray[np.bool_], experts: int) -> int:
    """Experts of a layer that may have a replica outside S."""
    return min(experts, int(slots[~inside].sum()))


def _sets(
    layer: LayerHits, usable: npt.NDArray[np.bool_], slots: npt.NDArray[np.int32]
) -> list[npt.NDArray[np.bool_]]:
    """Sets S of places, by the time that they would need for the mean of what must be left to them."""
    places = np.flatnonzero(usable)
    fixed, step = layer.fixed, layer.step
    found: set[tuple[int, ...]] = set()
    if len(places) <= 10:
        for size in range(1, len(places)):
            found.update(combinations(places.tolist(), size))
    else:
        for order in (np.argsort(step[places]), np.argsort(fixed[places]), np.argsort((fixed + 4 * step)[places])):
            found.update(tuple(sorted(places[order][skip:].tolist())) for skip in range(1, len(places)))
    hottest = np.concatenate([[0.0], np.cumsum(-np.sort(-layer.alone))])
    mean = float(layer.distinct.mean())
    scored = []
    for members in sorted(found):
        inside = np.zeros(len(usable), dtype=np.bool_)
        inside[list(members)] = True
        left = mean - hottest[_room(slots, inside, layer.experts)]
        if left > 1e-6:
            whole = int(left)
            low, high = time_for(fixed, step, np.array([max(1, whole), whole + 1]), inside)
            ends = (low + (left - whole) * (high - low)) * min(1.0, left)  # less than one: seldom touched at all
            scored.append((float(ends), members, inside))
    scored.sort(key=lambda entry: (-entry[0], entry[1]))
    return [inside for _, _, inside in scored[:MOST_SETS]]


def _any_plan(
    cluster: Cluster,
    one: SetTimes,
    start: Multipliers,
    usable: npt.NDArray[np.bool_],
    layers: Sequence[LayerHits],
    pool: ThreadPoolExecutor,
) -> float:
    """By one set: seconds of all layers, however memory is shared out over them."""
    experts = layers[0].experts
    # Other numbers of slots ask for other prices; where these are loose, those are not.
    fuller = layers[0].at(one.inside, usable, (one.room + experts) // 2)
    firsts = [
        (each.room, layers[0].raise_bound([each], layers[0].prices(near), FIRST_STEPS)[1])
        for each, near in ((one, [start]), (fuller, layers[0].search([fuller], rounds=FINEST)[1]))
    ]

    def curve(index: int) -> Floats:
        layer = layers[index]
        bound: Floats = np.full(experts + 1, layer.free.mean())
        for room, first in firsts:
            here = layer.at(one.inside, usable, room)
            prices = layer.raise_bound([here], layer.carried(first, layers[0]), STEPS // 2)[1]
            bound = np.maximum(bound, layer.curve(here, prices))
        return bound

    curves = np.stack(list(pool.map(curve, range(len(layers)))))
    sizes = np.array([cluster.bytes_of(layer) for layer in range(len(layers))])
    budget = _bytes_outside(cluster, ~one.inside)
    room = np.arange(experts + 1)
    best = 0.0
    scale = float(curves.max()) / (experts * int(sizes.max()))
    for price in scale * np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 120)]):
        least = (curves + price * sizes[:, None] * room).min(axis=1).sum() - price * budget
        best = max(best, float(least))
    return best


def _same_slots(
    sets: Sequence[SetTimes],
    start: Sequence[Multipliers],
    usable: npt.NDArray[np.bool_],
    layers: Sequence[LayerHits],
    slots: npt.NDArray[np.int32],
    pool: ThreadPoolExecutor,
) -> float:
    """Seconds of all layers with these slots."""
    first = layers[0].raise_bound(sets, layers[0].prices(start), FIRST_STEPS)[1]

    def bound(index: int) -> float:
        layer = layers[index]
        here = [layer.at(one.inside, usable, _room(slots[index], one.inside, layer.experts)) for one in sets]
        return max(float(layer.free.mean()), layer.raise_bound(here, layer.carried(first, layers[0]), STEPS)[0])

    return sum(pool.map(bound, range(len(layers))))
