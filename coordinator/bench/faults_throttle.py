"""One of two holders gets a quarter of a core: a layer's time when the dispatcher chooses, and with fixed choices.

Some experts are on the quick node alone, some on the slow one alone, the rest on both. A fixed choice is a layer
whose experts are drawn from the first two kinds, so many of them from the slow node's; the dispatcher's is one whose
experts are drawn from the third. All read as many experts, in turns within one run. The best fixed choice is the one
with the least mean.
"""

from statistics import fmean, median
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from ..types import Owners
from .faults_cluster import NODES, FaultCluster
from .faults_report import FaultRow
from .throttle import throttled

QUICK, SLOW = NODES[:2]
SHARE = 0.25  # of a core, that the slow node gets
GOAL = 1.15
SEQUENCES, TOP_K = 4, 8  # of a layer
DISTINCT = 12  # experts in a layer, each of several sequences
ON_SLOW = 4  # of them at most, in a fixed choice
WARM_LAYERS, LAYERS = 24, 48  # of a way, each time it has its turn; the first ones are not counted


async def measure_throttled(made: FaultCluster, rounds: int) -> list[FaultRow]:
    """One row. Raises CoordinatorError when the cluster does not take up the plan."""
    await made.adopt(_owners(made))
    pid = made.pid(SLOW)
    assert pid is not None
    draw = np.random.default_rng(0)
    times: dict[int | None, list[float]] = {way: [] for way in (*range(ON_SLOW + 1), None)}
    with throttled(pid, SHARE) as means:
        for _ in range(rounds):
            for on_slow, found in times.items():
                found.append(await _layers(made, draw, on_slow))
    free = times.pop(None)
    usual = {way: fmean(found) for way, found in times.items()}
    best = min(usual, key=lambda way: usual[way])
    fixed = ", ".join(f"{way or 0}: {1e3 * seconds:.1f}" for way, seconds in usual.items())
    return [
        FaultRow(
            what="layer time with a node at a quarter of a core / best fixed choice",
            seconds=False,
            values=[median(mine / theirs for mine, theirs in zip(free, times[best], strict=True))],
            goals=[GOAL],
            note=f"{means}; {1e3 * fmean(free):.1f} ms, fixed with so many of {DISTINCT} experts there: {fixed} ms",
        )
    ]


def _owners(made: FaultCluster) -> Owners:
    """On the quick node alone, on the slow one alone, on both."""
    alone = DISTINCT + ON_SLOW
    return tuple(
        ((QUICK,),) * DISTINCT + ((SLOW,),) * ON_SLOW + ((QUICK, SLOW),) * (layer.experts - alone)
        for layer in made.coordinator.manifest.layers
    )


async def _layers(made: FaultCluster, draw: np.random.Generator, on_slow: int | None) -> float:
    """Mean seconds of a layer with `on_slow` experts on the slow node; None: as the dispatcher chooses."""
    dispatcher, layer = made.coordinator.dispatcher, made.coordinator.manifest.layers[0]
    hidden = torch.randn(SEQUENCES, layer.spec.hidden_size)
    weights = torch.full((SEQUENCES, TOP_K), 1 / TOP_K)
    spent = []
    for number in range(WARM_LAYERS + LAYERS):
        ids = torch.from_numpy(_ids(draw, on_slow, layer.experts))
        start = perf_counter()
        await dispatcher.submit(0, hidden, ids, weights)
        if number >= WARM_LAYERS:
            spent.append(perf_counter() - start)
    return fmean(spent)


def _ids(draw: np.random.Generator, on_slow: int | None, experts: int) -> npt.NDArray[np.int64]:
    """[SEQUENCES, TOP_K] of DISTINCT experts."""
    if on_slow is None:
        chosen = draw.choice(np.arange(DISTINCT + ON_SLOW, experts), DISTINCT, replace=False)
    else:
        quick = draw.choice(DISTINCT, DISTINCT - on_slow, replace=False)
        chosen = np.concatenate([quick, DISTINCT + draw.choice(ON_SLOW, on_slow, replace=False)])
        draw.shuffle(chosen)
    return np.stack([np.roll(chosen, -t * DISTINCT // SEQUENCES)[:TOP_K] for t in range(SEQUENCES)])
