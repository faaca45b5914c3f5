"""A model's forward pass in this process, for measuring: its experts are read from the source, a layer at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction, load_expert

from ..models.base import ExpertBackend, SequenceInput, Trunk

Read = Callable[[ExpertId], torch.Tensor]  # an expert's blob

_ROWS = 32  # of logits, that are worked on at once


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


def run_through(trunk: Trunk, experts: ExpertBackend, texts: Sequence[torch.Tensor]) -> None:
    """Asks the experts for all of each text (int64 [T]); what the model says is not wanted."""
    for _ in _passes(trunk, experts, texts, all_logits=False):
        pass


def log_probabilities(trunk: Trunk, experts: ExpertBackend, texts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What the model says after each token of each text (int64 [T]): f32 [tokens, vocab], a forward pass at a time.

    All of them at once would take gigabytes: 8192 tokens of a vocabulary of 248,000 are 8 GB.
    """
    for logits in _passes(trunk, experts, texts, all_logits=True):
        for rows in logits.split(_ROWS):
            rows.copy_(torch.log_softmax(rows, 1))
        yield logits


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


def _passes(
    trunk: Trunk, experts: ExpertBackend, texts: Sequence[torch.Tensor], all_logits: bool
) -> Iterator[torch.Tensor]:
    for text in texts:
        cache = trunk.new_cache()
        try:
            for chunk in text.split(trunk.prefill_chunk):
                (logits,) = asyncio.run(_one(trunk, experts, SequenceInput(chunk, cache, all_logits)))
                yield logits
        finally:
            trunk.free_cache(cache)


async def _one(trunk: Trunk, experts: ExpertBackend, one: SequenceInput) -> list[torch.Tensor]:
    return await trunk.forward([one], experts)


def divergence(reference: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    """Mean KL divergence, nats a token, of two `log_probabilities`, each of which is gone through once."""
    total, tokens = 0.0, 0
    for exact, changed in zip(reference, other, strict=True):
        for p, q in zip(exact.split(_ROWS), changed.split(_ROWS), strict=True):
            total += float((p.exp() * (p - q)).sum(1).double().sum())
        tokens += len(exact)
    return total / tokens
