"""How long a step takes.

    decode   trunk's bytes by the coordinator's speed (one_token.py) and recurrent state, and in each layer: fixed
             cost of the trunk, and, of the machines that a token's experts lie on, the slowest (round trip, cost of a
             message, its experts' bytes by its speed), as far as it takes longer than the shared expert, which the
             coordinator computes meanwhile
    prefill  the same for a chunk of tokens: nearly all experts are read, products with all tokens but the first are
             added to the reading, and so are the wire and what the trunk does with each token beside products

Which experts a token is sent to is not known, so they are drawn at random, all alike likely: the mean over many draws
of the slowest machine's time, with each distinct expert of a batch counted once. Real routers prefer some experts, so
a batch hits fewer of them; one token is not affected.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moehive.kernels.geometry import LayerGeometry

from .cluster import Cluster, Machine
from .constants import (
    CHUNK_TOKENS,
    COLUMN_S,
    HOP_S,
    LAYER_S,
    MESSAGE_S,
    OTHER_PRODUCTS,
    PRODUCTS,
    PRODUCTS_PER_BYTE,
    TOKEN_S,
)
from .holding import Holding, Placed
from .model import SHARED, Model
from .one_token import part_speed, tier_speeds

_DRAWS = 400
_NUMBER_BYTES = 2 + 4  # of one number of a hidden state, there and back
_SLOW_BYTES_PER_S = 2e9 / 8  # below it a prompt's travel in 8 bits, with a scale for each 64 (dispatch/cpp/speeds.h)
_SLOW_NUMBER_BYTES = 1 + 4 / 64  # one way


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one decode step, for the whole batch; `experts_s` and `hop_s` as the coordinator sees them."""

    trunk_s: float
    experts_s: float
    hop_s: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.trunk_s + self.experts_s + self.hop_s


def decode_step(model: Model, cluster: Cluster, placed: Placed, batch: int = 1) -> Step:
    """One token for each of `batch` sequences."""
    trunk = _trunk_s(model, cluster)
    experts = hop = 0.0
    shared = shared_s(model, cluster)
    message = batch * model.hidden * _NUMBER_BYTES / cluster.bandwidth
    for layer, count in _kinds(model.layers):
        computing, waiting = _layer(layer, model, cluster, placed.holdings, batch, shared, message)
        experts += count * min(computing, waiting)
        hop += count * max(0.0, waiting - computing)
    return Step(trunk, experts, hop)


def prefill_rate(model: Model, cluster: Cluster, placed: Placed, tokens: int = CHUNK_TOKENS) -> float:
    """Tokens a second of a prompt that goes through the layers in chunks of so many."""
    own = _products_per_s(model, cluster.coordinator, on_gpu=False)
    beside = tokens * model.decoder_layers * model.hidden * COLUMN_S * cluster.coordinator.step_factor
    seconds = _trunk_s(model, cluster) + (tokens - 1) * model.trunk_weights / own + beside
    shared = shared_s(model, cluster) + (tokens - 1) * model.shared_weights_a_layer / own
    asked = [h for h in placed.holdings if h.expert_bytes]
    remote = sum(not h.machine.coordinator for h in asked)
    # The coordinator's one link carries what goes to all nodes. A slow one brings answers while others are asked.
    slow = cluster.bandwidth < _SLOW_BYTES_PER_S
    number = (remote + 1) * _SLOW_NUMBER_BYTES if slow else remote * _NUMBER_BYTES
    wire = tokens * model.hidden * number / cluster.bandwidth
    for layer, count in _kinds(model.layers):
        products = max(0, tokens * layer.top_k - layer.experts) * layer.spec.weights
        computing = max(
            (
                products * h.expert_bytes / model.expert_bytes / _products_per_s(model, h.machine, bool(h.vram_bytes))
                for h in asked
            ),
            default=0.0,  # where no machine has room for any
        )
        seconds += count * _layer(layer, model, cluster, placed.holdings, tokens, shared, wire, computing)[1]
    return tokens / seconds


def load_seconds(cluster: Cluster, placed: Placed, trunk_bytes: int) -> float:
    """From a model on the coordinator's disk (as quick as its link if it has none in the table) to the first token.

    All slices leave through the coordinator's one link; those of its own memory do not.
    """
    remote = sum(h.expert_bytes for h in placed.holdings if not h.machine.coordinator)
    local = sum(h.expert_bytes for h in placed.holdings if h.machine.coordinator) + trunk_bytes
    disk = cluster.coordinator.disk
    source = disk.bytes_per_s if disk is not None else cluster.bandwidth
    return max(remote / cluster.bandwidth, (remote + local) / source)


def _kinds(layers: Sequence[LayerGeometry]) -> list[tuple[LayerGeometry, int]]:
    """Equal layers together."""
    kinds: dict[LayerGeometry, int] = {}
    for layer in layers:
        kinds[layer] = kinds.get(layer, 0) + 1
    return list(kinds.items())


def _layer(
    layer: LayerGeometry, model: Model, cluster: Cluster, holdings: Sequence[Holding], batch: int, shared_s: float,
    message_s: float, products_s: float = 0.0,
) -> tuple[float, float]:  # fmt: skip
    """Mean seconds of a layer's experts: the slowest machine's computing, and what the coordinator waits for them.

    It computes the shared expert first, in `shared_s`, while others are at work. `message_s`: of what is sent there
    and back; `products_s`: of multiplying beyond the reading.
    """
    held = [h for h in holdings if h.expert_bytes]
    if not held:
        return 0.0, 0.0
    counts = distinct(layer, [h.expert_bytes for h in held], batch)
    size = layer.nbytes / layer.experts
    computing = counts * np.array([h.seconds(size, tier_speeds(model, h.machine)) for h in held])
    remote = np.array([not h.machine.coordinator for h in held])
    asked = (counts > 0) & remote
    factor = cluster.coordinator.step_factor
    whole = computing + products_s + asked * (cluster.rtt_s + factor * HOP_S + message_s)
    others = np.maximum(asked.sum(1) - 1, 0) * factor * MESSAGE_S
    waiting = np.maximum(
        whole.max(1, where=remote, initial=0.0) + others - shared_s, whole.max(1, where=~remote, initial=0.0)
    )
    return float(computing.max(1).mean()), float(np.maximum(waiting, 0.0).mean())


def distinct(layer: LayerGeometry, weights: Sequence[int], batch: int) -> npt.NDArray[np.float64]:
    """[draws, machines]: how many distinct experts of a batch lie on each machine, experts split by `weights`."""
    rng = np.random.Generator(np.random.PCG64(1))
    bounds = np.cumsum(weights) / sum(weights) * layer.experts
    owner = np.searchsorted(bounds, np.arange(layer.experts) + 0.5)
    owner = np.minimum(owner, len(weights) - 1)
    draws = max(16, _DRAWS // batch)
    hit = np.zeros((draws, layer.experts), dtype=bool)
    for _ in range(batch):
        drawn = rng.random((draws, layer.experts)).argpartition(layer.top_k - 1, axis=1)[:, : layer.top_k]
        np.put_along_axis(hit, drawn, True, axis=1)
    return np.stack([hit[:, owner == n].sum(1) for n in range(len(weights))], 1).astype(np.float64)


def _trunk_s(model: Model, cluster: Cluster) -> float:
    """Seconds of the trunk for one token of each sequence of a batch."""
    ram = cluster.coordinator.ram
    assert ram is not None
    fixed = cluster.coordinator.step_factor * (TOKEN_S + model.decoder_layers * LAYER_S)
    state = 2 * model.state_bytes / ram.bytes_per_s
    parts = model.part_bytes_a_token().items()
    return fixed + state + sum(nbytes / part_speed(model, cluster.coordinator, part) for part, nbytes in parts)


def shared_s(model: Model, cluster: Cluster) -> float:
    """Seconds that the coordinator computes the shared expert of a layer for one token of each sequence."""
    return model.shared_bytes_a_layer / part_speed(model, cluster.coordinator, SHARED)


def _products_per_s(model: Model, machine: Machine, on_gpu: bool) -> float:
    """Products of a number and a weight of the model that is at hand."""
    tier = machine.vram if on_gpu else machine.ram
    assert tier is not None
    of_q8_0 = None if on_gpu else machine.products_per_s
    if of_q8_0 is None:
        of_q8_0 = PRODUCTS_PER_BYTE * tier.bytes_per_s
    return model.by_format({name: share * of_q8_0 for name, share in PRODUCTS.items()}, OTHER_PRODUCTS * of_q8_0)
