"""A first plan for one layer, from mean loads alone; annealing goes on from it."""

import numpy as np
import numpy.typing as npt

from .native import Floats, Replicas


def first_plan(load: Floats, fixed: Floats, step: Floats, slots: npt.NDArray[np.int32], pinned: Replicas) -> Replicas:
    """Each expert once, hot ones first, where its place ends earliest; then free slots get the hottest of the rest.

    `load` [experts] are mean hits a batch; `fixed`, `step` (seconds) and `slots` are [places]. A place so far away
    that the others are done before it answers gets what is left at the end: the coldest. The slots must suffice.
    """
    experts, places = len(load), len(slots)
    replicas = pinned.copy()
    bits = np.uint64(1) << np.arange(places, dtype=np.uint64)
    free = slots.astype(np.int64) - [int(np.count_nonzero(pinned & bit)) for bit in bits]
    busy = np.array([step[p] * load[(pinned & bits[p]) != 0].sum() for p in range(places)])
    order = np.lexsort((np.arange(experts), -load))
    for expert in order:
        if replicas[expert]:
            continue
        ends = np.where(free > 0, fixed + busy + step * max(load[expert], 1e-9), np.inf)
        place = int(np.argmin(ends))
        replicas[expert] |= bits[place]
        free[place] -= 1
        busy[place] += step[place] * load[expert]
    for place in range(places):
        fill = [e for e in order if not replicas[e] & bits[place]][: max(0, int(free[place]))]
        replicas[fill] |= bits[place]
    return replicas
