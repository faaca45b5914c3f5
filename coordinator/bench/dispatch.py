"""`moehive bench dispatch`: what the dispatcher does for a layer beside sending, and what a choice by chance costs.

It chooses among replicas, splits the layer by node, and notes its routing.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from ..dispatch.link import Link
from ..dispatch.routes import Routes
from ..dispatch.routing import split
from ..dispatch.speed import LinkSpeed
from ..dispatch.statistics import Pass, RoutingStatistics, passing
from ..types import NodeName, Plan
from .decode import DecodeSettings, measure_decode
from .random_file import random_file
from .random_model import RandomModel

EXPERTS, TOP_K, EXPERT_BYTES = 128, 8, 5_000_000
LAYERS = 50  # batches that are chosen for, one after the other
ROUNDS = 40  # of them; the best counts
SHAPES = ((4, 2), (8, 2), (8, 3))  # nodes, and how many hold each expert
# The layers that noting is compared with: small ones on one node, whose experts are read in no time.
STEP_MODEL = RandomModel(geometry="qwen3-30b", format="q4_0", layers=4, experts=16)


@dataclass(frozen=True, slots=True)
class DispatchRow:
    """One shape: a batch's tokens, nodes, holders of each expert."""

    batch: int
    nodes: int
    holders: int
    choice_us: float  # for a layer
    split_us: float  # the same
    random_ratio: float  # the layer's time with holders drawn by chance, by that with the choice


def measure_dispatch() -> list[dict[str, Any]]:
    """Rows for batches of 1 and 16; nodes' speeds differ by up to four times."""
    return [asdict(_measure(batch, nodes, holders)) for batch in (1, 16) for nodes, holders in SHAPES]


def _measure(batch: int, nodes: int, holders: int) -> DispatchRow:
    draw = random.Random(batch * 100 + nodes * 10 + holders)
    names = [NodeName(f"node-{n}") for n in range(nodes)]
    owners = tuple(tuple(draw.sample(names, holders)) for _ in range(EXPERTS))
    routes = Routes([EXPERT_BYTES], with_local=False, changed=lambda: None)
    for name in names:
        speed = LinkSpeed(loopback=False)
        speed.note(4096, 8192, draw.uniform(0.2e-3, 0.3e-3))
        routes.asking.links[name] = cast(Link, SimpleNamespace(speed=speed))
    routes.follow(Plan(1, (owners,)), holding=None)
    seconds = {name: EXPERT_BYTES / (20e9 * draw.uniform(0.25, 1.0)) for name in names}
    for name in names:
        routes.speeds.of(name).note(1, 1, EXPERT_BYTES, seconds[name], 1)
    batches = [
        np.array([draw.sample(range(EXPERTS), TOP_K) for _ in range(batch)], dtype=np.int64) for _ in range(LAYERS)
    ]
    weights = np.ones((batch, TOP_K), dtype=np.float32)
    chosen = [routes.owner(0, ids) for ids in batches]
    choice = _best_us(lambda: [routes.owner(0, ids) for ids in batches])
    splitting = _best_us(lambda: [split(ids, weights, owner) for ids, owner in zip(batches, chosen, strict=True)])

    def layer_time(pick: dict[int, NodeName]) -> float:
        return max(seconds[name] * sum(other == name for other in pick.values()) for name in set(pick.values()))

    ours = by_chance = 0.0
    for ids, owner in zip(batches, chosen, strict=True):
        experts = set(ids.reshape(-1).tolist())
        ours += layer_time({expert: routes.placed.names[owner[expert]] for expert in experts})
        by_chance += layer_time({expert: draw.choice(owners[expert]) for expert in experts})
    return DispatchRow(batch, nodes, holders, choice, splitting, by_chance / ours)


def measure_statistics(state_dir: Path) -> list[dict[str, Any]]:
    """One row: noting a decode step's routing, beside the layers of a real step, without attention and head.

    Writes the model and the cluster's folders below `state_dir`. Raises CoordinatorError or OSError.
    """
    statistics = RoutingStatistics([EXPERTS] * LAYERS, TOP_K)
    ids = np.arange(TOP_K, dtype=np.int64)[None]

    def step() -> None:
        passing.set(Pass([(1, 1)]))
        for layer in range(LAYERS):
            statistics.note(layer, ids)

    note = _best_us(step)
    passing.set(None)
    model = random_file(STEP_MODEL, state_dir / "bench" / "models")
    row = measure_decode(DecodeSettings(model=model, state_dir=state_dir, nodes=1))
    assert STEP_MODEL.layers is not None
    layer = row.token_ms * 1e3 * (row.experts_share + row.hop_share) / STEP_MODEL.layers
    return [{"statistics_us": note, "layer_us": layer, "statistics_share": note / layer}]


def _best_us(work: Callable[[], object]) -> float:
    """Microseconds that `work` on all layers takes for one."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = perf_counter()
        work()
        best = min(best, perf_counter() - start)
    return best / LAYERS * 1e6
