"""A model's forward pass in this process, for measuring: its experts are read from the source, a layer at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction, load_expert

from ..models.base import ExpertBackend, SequenceInput, Trunk

Read = Callable[[ExpertId], torch.Tensor]  # an expert's blob


class Experts:
    """An ExpertBackend that reads what a layer needs, keeps the layers that fit into memory, and computes at once."""

    def __init__(self, manifest: Manifest, read: Read, ops: ExpertOps, memory: int) -> None:
        """`memory`: bytes of experts that may be kept from one pass to the next, at least a layer's are held."""
        self.manifest = manifest
        self.read = read
        self.ops = ops
        self._memory = memory
        self._held: dict[int, dict[int, ExpertWeights]] = {}
        self._bytes = 0

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        """See ExpertBackend.submit."""
        return Ready(self.compute(layer, hidden, ids, weights))

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts, [tokens, hidden] of hidden's dtype."""
        geometry = self.manifest.layers[layer]
        ids, weights = ids.cpu().long(), weights.cpu().float()
        named = ids < geometry.experts
        held = self._layer(layer, sorted(set(ids[named].tolist())))
        offsets = np.concatenate([[0], named.sum(1).cumsum(0).numpy()]).astype(np.uint32)
        pairs = ids[named].numpy().astype(np.uint32)
        return self.ops.moe_layer(
            geometry.spec, held, hidden, offsets, pairs, weights[named].numpy(), Reduction.PARTIAL_SUM
        )

    def _layer(self, layer: int, numbers: list[int]) -> dict[int, ExpertWeights]:
        held = self._held.setdefault(layer, {})
        for number in numbers:
            if number not in held:
                expert = ExpertId(layer, number)
                held[number] = load_expert(self.manifest.layers[layer].spec_of(number), self.read(expert))
                self._bytes += self.manifest.nbytes(expert)
        for other in [other for other in self._held if other != layer and self._bytes > self._memory]:
            self._bytes -= sum(len(expert.blob) for expert in self._held.pop(other).values())
        return held


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """An Awaitable that is done."""

    value: torch.Tensor

    def __await__(self) -> Generator[Any, None, torch.Tensor]:
        yield from ()
        return self.value


def log_probabilities(trunk: Trunk, experts: ExpertBackend, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """f32 [tokens of all texts, vocab]: what the model says after each token of each text (int64 [T])."""
    return torch.log_softmax(torch.cat([asyncio.run(_logits(trunk, experts, text)) for text in texts]), 1)


def greedy(
    trunk: Trunk, experts: ExpertBackend, prompt: torch.Tensor, count: int, stops: frozenset[int]
) -> list[int]:
    """The likeliest tokens after `prompt` (int64 [T]), at most `count`, up to one of `stops`."""
    return asyncio.run(_greedy(trunk, experts, prompt, count, stops))


async def _greedy(
    trunk: Trunk, experts: ExpertBackend, prompt: torch.Tensor, count: int, stops: frozenset[int]
) -> list[int]:
    cache = trunk.new_cache()
    try:
        found: list[int] = []
        for chunk in prompt.split(trunk.prefill_chunk):
            (logits,) = await trunk.forward([SequenceInput(chunk, cache)], experts)
        while (token := int(logits.argmax())) not in stops and len(found) < count:
            found.append(token)
            (logits,) = await trunk.forward([SequenceInput(torch.tensor([token]), cache)], experts)
        return found
    finally:
        trunk.free_cache(cache)


async def _logits(trunk: Trunk, experts: ExpertBackend, text: torch.Tensor) -> torch.Tensor:
    cache = trunk.new_cache()
    try:
        parts = []
        for chunk in text.split(trunk.prefill_chunk):
            (part,) = await trunk.forward([SequenceInput(chunk, cache, all_logits=True)], experts)
            parts.append(part)
        return torch.cat(parts)
    finally:
        trunk.free_cache(cache)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence, nats a token, of two `log_probabilities`."""
    return float((reference.exp() * (reference - other)).sum(1).mean())
