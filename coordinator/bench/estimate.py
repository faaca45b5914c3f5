"""`moehive bench estimate`: what `moehive estimate` says of this machine's clusters, and what they then do.

For each shape and format a file of random weights (few layers, few experts: what is read for a token is the real
model's), a coordinator with all cores and nodes with one thread each on this machine. The speeds that the estimate is
given are measured between the rounds, since other guests of a virtual machine's host take more and less of them.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from moehive.kernels.machine import cores
from moehive.kernels.speed import multiplying, reading

from ..estimate.cluster import Cluster, Machine, Tier
from ..estimate.constants import CONTEXT_TOKENS, COORDINATOR_BYTES
from ..estimate.geometries import GEOMETRIES, VOCABULARY
from ..estimate.holding import hold
from ..estimate.model import Model, check_format, of_shape
from ..estimate.step import decode_step, distinct, prefill_rate, shared_s
from ..estimate.this_machine import step_factor
from ..types import CoordinatorError
from .decode import DecodeSettings, measure_decode
from .random_model import RandomModel, random_model

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
    step_factor: float

    @classmethod
    def measure(cls) -> "_Speeds":
        """In a second. Raises NativeLibraryError."""
        both = dict.fromkeys((cores(), NODES, 1))
        read = {threads: reading(threads) for threads in both}
        products = {threads: multiplying(threads) for threads in (cores(), NODES)}
        return cls(read[cores()], read[NODES], read[1], products[cores()], products[NODES], step_factor())


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
            path = random_model(wanted, state_dir / "bench" / "models")
            shape = GEOMETRIES[geometry]
            model = of_shape(geometry, shape, check_format(format), layers, experts, VOCABULARY)
            rows.append(_row(model, path, state_dir, quick))
    return rows


def _row(model: Model, path: Path, state_dir: Path, quick: bool) -> dict[str, Any]:
    prompt = 32 if quick else 128
    found: list[_Speeds] = []
    measured = measure_decode(
        DecodeSettings(
            model=path,
            state_dir=state_dir,
            nodes=NODES,
            prompt=prompt,
            tokens=16 if quick else 64,
            rounds=1 if quick else 3,
        ),
        lambda: found.append(_Speeds.measure()),
    )
    speeds = _Speeds(*map(statistics.median, zip(*found, strict=True)))
    cluster = _cluster(model, speeds)
    placed = hold(model, cluster)
    step = decode_step(model, cluster, placed)
    token_s = 1 / measured.decode_tokens_per_s
    shared = len(model.layers) * shared_s(model, cluster)  # while others compute, where it is measured
    return {
        "geometry": model.name,
        "format": model.format,
        "layers": model.decoder_layers,
        "estimated_tokens_per_s": 1 / step.seconds,
        "measured_tokens_per_s": measured.decode_tokens_per_s,
        "ratio": 1 / step.seconds / measured.decode_tokens_per_s,
        "estimated_trunk_ms": (step.trunk_s - shared) * 1e3,
        "measured_trunk_ms": measured.trunk_share * token_s * 1e3,
        "estimated_experts_and_hop_ms": (step.experts_s + step.hop_s + shared) * 1e3,
        "measured_experts_and_hop_ms": (1 - measured.trunk_share) * token_s * 1e3,
        "measured_experts_ms": measured.experts_ms,
        # The constants of coordinator/estimate/constants.py with which this row would have been met.
        "fitting_layer_s": _fitting(
            step.trunk_s - shared, measured.trunk_share * token_s, model.decoder_layers, "LAYER_S"
        ),
        "fitting_hop_s": _fitting(
            step.experts_s + step.hop_s + shared, (1 - measured.trunk_share) * token_s, len(model.layers), "HOP_S"
        ),
        "estimated_prefill_tokens_per_s": prefill_rate(model, cluster, placed, prompt),
        "measured_prefill_tokens_per_s": measured.prefill_tokens_per_s,
        "read_Bps": speeds.read,
        "read_Bps_by_one": speeds.read_by_one,
        "products_per_s": speeds.products,
        "step_factor": speeds.step_factor,
    }


def _cluster(model: Model, speeds: _Speeds) -> Cluster:
    """As `bench decode` starts it: the coordinator keeps no experts."""
    kv = CONTEXT_TOKENS * model.kv_bytes_a_token
    own = Tier(model.trunk_bytes + kv + COORDINATOR_BYTES, speeds.read)
    products = speeds.products_by_nodes / NODES
    node = Machine("", ram=Tier(_PLENTY, _beside(model, speeds)), products_per_s=products)
    nodes = (replace(node, name=f"node-{n + 1}") for n in range(NODES))
    # All processes share this machine's processors, and wait for them when a layer's messages come and go.
    factor = speeds.step_factor * max(1.0, (NODES + 1) / cores())
    coordinator = Machine(
        "coordinator", coordinator=True, ram=own, step_factor=factor, products_per_s=speeds.products
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


def _fitting(estimated: float, measured: float, times: int, constant: str) -> float:
    from ..estimate import constants

    used: float = getattr(constants, constant)
    return used + (measured - estimated) / times
