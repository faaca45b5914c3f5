"""`moehive bench estimate`: what `moehive estimate` says of this machine's clusters, and what they then do.

For each shape and format a file of random weights (few layers, few experts: what is read for a token is the real
model's), a coordinator with all cores and nodes with one thread each on this machine. Other guests of a virtual
machine's host take more and less of it from one second to the next, so each round is compared with what the speeds
measured before and after it let expect, and the median of rounds counts.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from moehive.kernels.machine import cores
from moehive.kernels.speed import multiplying, multiplying_one, reading

from ..estimate.cluster import Cluster, Machine, Tier
from ..estimate.constants import CONTEXT_TOKENS, COORDINATOR_BYTES, HOP_S, LAYER_S
from ..estimate.geometries import GEOMETRIES, VOCABULARY
from ..estimate.holding import hold
from ..estimate.model import Model, check_format, of_shape
from ..estimate.step import decode_step, distinct, prefill_rate, shared_s
from ..estimate.this_machine import step_factor
from ..types import CoordinatorError
from .decode import DecodeSettings, Round, measure_decode
from .random_file import random_file
from .random_model import RandomModel

FORMATS = ("q8_0", "q4_k")
# Layers and experts of each: all kinds of layers, and files below 1 GB.
SIZES = {"qwen3.5-35b": (8, 16), "qwen3.5-397b": (4, 12), "qwen3-30b": (6, 16), "kimi-k2": (2, 8)}
NODES = 2
_PLENTY = 1 << 45  # bytes: the nodes hold everything
# Bytes a second, there and back together, of ciphers and copies on the same processors, where the step factor is 1;
# on Zen 4 0.6e9. Small messages do not feel it.
_LOOPBACK_BANDWIDTH = 0.16e9


class _Speeds(NamedTuple):
    """Of this machine now: bytes and products a second of all cores, of as many as there are nodes, and of one.

    Bytes are those of weights; `step_factor` as in estimate/cluster.py.
    """

    read: float
    read_by_nodes: float
    read_by_one: float
    products: float
    products_by_nodes: float
    token_products: float
    token_products_by_nodes: float
    step_factor: float

    @classmethod
    def measure(cls) -> "_Speeds":
        """In a second. Raises NativeLibraryError."""
        both = dict.fromkeys((cores(), NODES, 1))
        read = {threads: reading(threads) for threads in both}
        products = {threads: multiplying(threads) for threads in {cores(), NODES}}
        of_one = {threads: multiplying_one(threads) for threads in {cores(), NODES}}
        return cls(
            read[cores()], read[NODES], read[1],
            products[cores()], products[NODES], of_one[cores()], of_one[NODES], step_factor(),
        )  # fmt: skip


def measure_estimate(
    state_dir: Path, geometries: Sequence[str], quick: bool, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """A row for each shape and format; `quick`: shorter texts. Raises CoordinatorError, OSError."""
    unknown = sorted(set(geometries) - SIZES.keys())
    if unknown:
        raise CoordinatorError(f"Unknown geometry {unknown[0]!r}; known are {', '.join(SIZES)}.")
    rows = []
    for geometry in geometries or SIZES:
        layers, experts = SIZES[geometry]
        for format in FORMATS:
            progress(f"{geometry} {format}")
            wanted = RandomModel(geometry=geometry, format=format, layers=layers, experts=experts)
            path = random_file(wanted, state_dir / "bench" / "models")
            shape = GEOMETRIES[geometry]
            model = of_shape(geometry, shape, check_format(format), layers, experts, VOCABULARY)
            rows.append(_row(model, path, state_dir, quick))
    return rows


def _row(model: Model, path: Path, state_dir: Path, quick: bool) -> dict[str, Any]:
    prompt = 32 if quick else 128
    found: list[_Speeds] = []
    rounds: list[Round] = []

    def beside(done: Round | None) -> None:
        found.append(_Speeds.measure())
        if done is not None:
            rounds.append(done)

    measure_decode(
        DecodeSettings(
            model=path,
            state_dir=state_dir,
            nodes=NODES,
            prompt=prompt,
            tokens=16 if quick else 48,
            rounds=1 if quick else 5,
        ),
        beside,
    )
    figures = [
        _figures(model, done, _Speeds(*map(statistics.mean, zip(*moment, strict=True))), prompt)
        for done, moment in zip(rounds, pairwise(found), strict=True)
    ]
    medians = {name: statistics.median(one[name] for one in figures) for name in figures[0]}
    return {"geometry": model.name, "format": model.format, "layers": model.decoder_layers, **medians}


def _figures(model: Model, done: Round, speeds: _Speeds, prompt: int) -> dict[str, float]:
    """Of one round, and of the estimate for a machine of these speeds."""
    cluster = _cluster(model, speeds)
    placed = hold(model, cluster)
    step = decode_step(model, cluster, placed)
    shared = len(model.layers) * shared_s(model, cluster)  # while others compute, where it is measured
    trunk, others = step.trunk_s - shared, step.experts_s + step.hop_s + shared
    measured_others = done.submit + done.waiting
    measured_trunk = max(0.0, done.token - measured_others)
    prefill = prefill_rate(model, cluster, placed, prompt)
    return {
        "estimated_tokens_per_s": 1 / step.seconds,
        "measured_tokens_per_s": 1 / done.token,
        "ratio": done.token / step.seconds,
        "estimated_trunk_ms": trunk * 1e3,
        "measured_trunk_ms": measured_trunk * 1e3,
        "estimated_experts_and_hop_ms": others * 1e3,
        "measured_experts_and_hop_ms": measured_others * 1e3,
        "measured_experts_ms": done.experts * 1e3,
        # The constants of coordinator/estimate/constants.py with which this round would have been met.
        "fitting_layer_s": LAYER_S + (measured_trunk - trunk) / model.decoder_layers,
        "fitting_hop_s": HOP_S + (measured_others - others) / len(model.layers),
        "estimated_prefill_tokens_per_s": prefill,
        "measured_prefill_tokens_per_s": prompt / done.first,
        "prefill_ratio": prefill * done.first / prompt,
        "read_Bps": speeds.read,
        "read_Bps_by_one": speeds.read_by_one,
        "products_per_s": speeds.products,
        "token_products_per_s": speeds.token_products,
        "step_factor": speeds.step_factor,
    }


def _cluster(model: Model, speeds: _Speeds) -> Cluster:
    """As `bench decode` starts it: the coordinator keeps no experts."""
    kv = CONTEXT_TOKENS * model.kv_bytes_a_token
    own = Tier(model.trunk_bytes + kv + COORDINATOR_BYTES, speeds.read)
    node = Machine(
        "",
        ram=Tier(_PLENTY, _beside(model, speeds)),
        products_per_s=speeds.products_by_nodes / NODES,
        token_products_per_s=speeds.token_products_by_nodes / NODES,
    )
    nodes = (replace(node, name=f"node-{n + 1}") for n in range(NODES))
    # All processes share this machine's processors, and wait for them when a layer's messages come and go.
    factor = speeds.step_factor * max(1.0, (NODES + 1) / cores())
    coordinator = Machine(
        "coordinator",
        coordinator=True,
        ram=own,
        step_factor=factor,
        products_per_s=speeds.products,
        token_products_per_s=speeds.token_products,
    )
    return Cluster(0.0, _LOOPBACK_BANDWIDTH / speeds.step_factor, (coordinator, *nodes))


def _beside(model: Model, speeds: _Speeds) -> float:
    """Bytes a second of the slowest of two nodes, which share this machine's memory with each other.

    While both compute, the coordinator reads its shared expert from it too; who has more of a layer's experts then
    goes on alone.
    """
    layer = model.layers[0]
    slowest = float(distinct(layer, [1] * NODES, 1).max(1).mean()) / layer.top_k
    together = 2 * (1 - slowest) + model.shared_bytes_a_layer * layer.experts / layer.top_k / layer.nbytes
    return slowest / (together / speeds.read_by_nodes + (2 * slowest - 1) / speeds.read_by_one)
