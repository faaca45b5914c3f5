"""`moehive bench dispatch`: what choosing among replicas costs for a layer, and what a choice by chance would."""

import random
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from ..dispatch.routes import Routes
from ..types import NodeName, Plan

EXPERTS, TOP_K, EXPERT_BYTES = 128, 8, 5_000_000
LAYERS = 50  # batches that are chosen for, one after the other
ROUNDS = 40  # of them; the best counts
SHAPES = ((4, 2), (8, 2), (8, 3))  # nodes, and how many hold each expert


@dataclass(frozen=True, slots=True)
class DispatchRow:
    """One shape: a batch's tokens, nodes, holders of each expert."""

    batch: int
    nodes: int
    holders: int
    choice_us: float  # for a layer
    random_ratio: float  # the layer's time with holders drawn by chance, by that with the choice


def measure_dispatch() -> list[dict[str, Any]]:
    """Rows for batches of 1 and 16; nodes' speeds differ by up to four times."""
    return [asdict(_measure(batch, nodes, holders)) for batch in (1, 16) for nodes, holders in SHAPES]


def _measure(batch: int, nodes: int, holders: int) -> DispatchRow:
    draw = random.Random(batch * 100 + nodes * 10 + holders)
    names = [NodeName(f"node-{n}") for n in range(nodes)]
    owners = tuple(tuple(draw.sample(names, holders)) for _ in range(EXPERTS))
    routes = Routes([EXPERT_BYTES], with_local=False, changed=lambda: None)
    routes.follow(Plan(1, (owners,)), holding=None)
    routes.placed.use(names)
    seconds = {name: EXPERT_BYTES / (20e9 * draw.uniform(0.25, 1.0)) for name in names}
    for name in names:
        routes.speeds.of(name).note(1, 1, EXPERT_BYTES, seconds[name], 1)
    batches = [
        np.array([draw.sample(range(EXPERTS), TOP_K) for _ in range(batch)], dtype=np.int64) for _ in range(LAYERS)
    ]
    best = float("inf")
    for _ in range(ROUNDS):
        start = perf_counter()
        chosen = [routes.owner(0, ids) for ids in batches]
        best = min(best, (perf_counter() - start) / LAYERS)

    def layer_time(pick: dict[int, NodeName]) -> float:
        return max(seconds[name] * sum(other == name for other in pick.values()) for name in set(pick.values()))

    ours = by_chance = 0.0
    for ids, owner in zip(batches, chosen, strict=True):
        experts = set(ids.reshape(-1).tolist())
        ours += layer_time({expert: routes.placed.names[owner[expert]] for expert in experts})
        by_chance += layer_time({expert: draw.choice(owners[expert]) for expert in experts})
    return DispatchRow(batch, nodes, holders, best * 1e6, by_chance / ours)
