"""What cache-aware routing does to a model's answers: the divergence at the output, by margin.

A text goes through the model token by token, as in decoding, with half of each layer's experts taken to be in memory:
those used last. Everything is computed; only the choice of experts differs.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.machine import cores
from moehive.kernels.ops import Reduction
from moehive.proto.tensors import Routing

from ..checkpoints.opening import ModelSource, open_model
from ..dispatch.local import LocalExperts
from ..models.base import SequenceInput, Trunk
from ..serving.text import Text
from ..trunk import load_trunk
from .trained_like import CONFIGS, save_trained_like, texts


class Divergence(NamedTuple):
    """Against the model's own routing: nats a token; and how often an expert that was asked for was in memory."""

    kl: float
    hit_rate: float


@dataclass(eq=False)
class _HalfInMemory:
    """An ExpertBackend whose `tiers` are itself."""

    manifest: Manifest
    local: LocalExperts
    margin: float
    slow: bool = True
    hits: int = 0
    lookups: int = 0

    def __post_init__(self) -> None:
        self._held: list[OrderedDict[int, None]] = [
            OrderedDict.fromkeys(range(layer.experts // 2)) for layer in self.manifest.layers
        ]

    @property
    def tiers(self) -> "_HalfInMemory":
        """See models.base.tiers_of."""
        return self

    def expect(self, layers: Sequence[Sequence[int]]) -> None:
        """See Tiers: nothing is read ahead here."""

    def on_disk(self, layer: int) -> npt.NDArray[np.bool_]:
        """See Tiers."""
        mask = np.ones(self.manifest.layers[layer].experts, dtype=np.bool_)
        mask[list(self._held[layer])] = False
        return mask

    async def _done(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        """See ExpertBackend; of one token."""
        held, numbers = self._held[layer], ids[0].tolist()
        self.lookups += len(numbers)
        for number in numbers:
            self.hits += int(number in held)
            held[number] = None
            held.move_to_end(number)
        while len(held) > self.manifest.layers[layer].experts // 2:
            held.popitem(last=False)
        routing = Routing(
            np.array([0, len(numbers)], dtype=np.uint32),
            np.array(numbers, dtype=np.uint32),
            weights[0].float().numpy(),
        )
        return self._done(self.local.compute(layer, hidden, routing, Reduction.PARTIAL_SUM))


def measure_divergences(
    model: Path | None, margins: Sequence[float], tokens: int, folder: Path
) -> dict[str, list[Divergence]]:
    """By model, for each margin: of the trained-like models, which are made in `folder`, and of `model`.

    Raises CoordinatorError for a model that can't be read.
    """
    found = {}
    for name, config in CONFIGS.items():
        save_trained_like(config, folder / name)
        ids: Sequence[int] = texts((tokens, 0))[0][0].tolist()
        found[name] = divergences(open_model(str(folder / name)), ids, margins)
    if model is not None:
        source = open_model(str(model))
        text = (files("moehive.coordinator.precision") / "calibration.txt").read_text(encoding="utf-8")
        ids = asyncio.run(Text(*source.tokenizer()).encode(text[: 16 * tokens]))[:tokens]
        found[source.manifest.name] = divergences(source, ids, margins)
    return found


def divergences(source: ModelSource, ids: Sequence[int], margins: Sequence[float]) -> list[Divergence]:
    """For each margin, over a text's tokens."""
    torch.set_grad_enabled(False)
    trunk, manifest = load_trunk(source, cores()), source.manifest
    local = LocalExperts(manifest, cores())
    every = (ExpertId(n, expert) for n, layer in enumerate(manifest.layers) for expert in range(layer.experts))
    local.hold(every, source.expert_blob)
    own = _log_probabilities(trunk, _HalfInMemory(manifest, local, 0.0), ids)
    found = []
    for margin in margins:
        backend = _HalfInMemory(manifest, local, margin)
        other = _log_probabilities(trunk, backend, ids)
        kl = (own.exp() * (own - other)).sum(1).mean()
        found.append(Divergence(float(kl), backend.hits / max(1, backend.lookups)))
    return found


def _log_probabilities(trunk: Trunk, backend: _HalfInMemory, ids: Sequence[int]) -> torch.Tensor:
    """f32 [tokens, vocabulary] after each token."""

    async def run() -> torch.Tensor:
        cache = trunk.new_cache()
        rows = [
            (await trunk.forward([SequenceInput(torch.tensor([token]), cache)], backend))[0].log_softmax(0)
            for token in ids
        ]
        trunk.free_cache(cache)
        return torch.stack(rows)

    return asyncio.run(run())
