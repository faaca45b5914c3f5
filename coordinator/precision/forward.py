"""A model's forward passes in this process, for measuring: its experts are read from the source, a layer at a time.

A model may be far larger than memory, so that reading it is what takes the time: passes go in step, all of them
through one layer before the first goes on to the next, and the layer is read once for all.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeVar

import numpy as np
import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction, load_expert

from ..models.base import ExpertBackend, SequenceInput, Trunk

Read = Callable[[ExpertId], torch.Tensor]  # an expert's blob
T = TypeVar("T")

_ROWS = 32  # of logits, that are worked on at once
IN_STEP: Final = 4096  # tokens, about: each keeps its state in all layers


class Experts:
    """An ExpertBackend that reads what a layer needs, keeps the layers that fit into memory, and computes at once."""

    def __init__(self, manifest: Manifest, read: Read, ops: ExpertOps, memory: int) -> None:
        """`memory`: bytes of experts that may be held; those that one layer is asked for are held in any case."""
        self.manifest = manifest
        self.read = read
        self.ops = ops
        self._memory = memory
        self._held: dict[int, dict[int, ExpertWeights]] = {}  # by layer
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

    def forget(self) -> None:
        """Holds nothing any more."""
        self._held, self._bytes = {}, 0

    def _layer(self, layer: int, numbers: list[int]) -> dict[int, ExpertWeights]:
        held = self._held.setdefault(layer, {})
        for number in numbers:
            if number not in held:
                expert = ExpertId(layer, number)
                self._make_room(layer, self.manifest.nbytes(expert))
                held[number] = load_expert(self.manifest.layers[layer].spec_of(number), self.read(expert))
                self._bytes += self.manifest.nbytes(expert)
        return held

    def _make_room(self, layer: int, nbytes: int) -> None:
        """Lets go of other layers' experts, the latest first: passes begin with the first layer, again and again."""
        for other in [other for other in reversed(self._held) if other != layer]:
            held = self._held[other]
            while held and self._bytes + nbytes > self._memory:
                number, _ = held.popitem()
                self._bytes -= self.manifest.nbytes(ExpertId(other, number))
            if held:
                return
            del self._held[other]


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """An Awaitable that is done; other passes go on first, so that they keep in step."""

    value: torch.Tensor

    def __await__(self) -> Generator[None, None, torch.Tensor]:
        yield  # as asyncio.sleep(0)
        return self.value


def run_through(
    trunk: Trunk, experts: ExpertBackend, texts: Sequence[torch.Tensor], all_logits: bool = False
) -> None:
    """Runs all of each text (int64 [T]) through the model, in step; what it says is not wanted.

    `all_logits`: it says something after each token, not after the last one only.
    """
    for group in _groups(texts, max(map(len, texts))):
        _in_step([_pass(trunk, experts, text, all_logits, take=_drop) for text in group])


def log_probabilities(trunk: Trunk, experts: ExpertBackend, texts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What the model says after each token of each text (int64 [T]): f32 [tokens, vocab], a forward pass at a time.

    All of them at once would take gigabytes: 8192 tokens of a vocabulary of 248,000 are 8 GB.
    """
    for text in texts:
        said: list[torch.Tensor] = []
        _in_step([_pass(trunk, experts, text, all_logits=True, take=said.append)])
        while said:
            yield _normalized(said.pop(0))


def divergences(
    reference: Sequence[torch.Tensor],
    passes: Iterable[tuple[Trunk, ExpertBackend]],
    texts: Sequence[torch.Tensor],
) -> Iterator[float]:
    """For each pass the mean KL divergence, nats a token, of what it says from `reference` (`log_probabilities`).

    Passes are made when their turn comes, some at once and in step; each lets go of what it says before the next one
    says something.
    """

    async def one(trunk: Trunk, experts: ExpertBackend) -> float:
        left, total = iter(reference), 0.0

        def compare(logits: torch.Tensor) -> None:
            nonlocal total
            total += _divergence(next(left), _normalized(logits))

        for text in texts:
            await _pass(trunk, experts, text, all_logits=True, take=compare)
        return total / sum(map(len, reference))

    for group in _groups(passes, max(map(len, texts))):
        yield from _in_step([one(*each) for each in group])


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


async def _pass(
    trunk: Trunk, experts: ExpertBackend, text: torch.Tensor, all_logits: bool, take: Callable[[torch.Tensor], None]
) -> None:
    cache = trunk.new_cache()
    try:
        for chunk in text.split(trunk.prefill_chunk):
            take((await trunk.forward([SequenceInput(chunk, cache, all_logits)], experts))[0])
    finally:
        trunk.free_cache(cache)


def _drop(_: torch.Tensor) -> None:
    pass


def _in_step(passes: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    async def together() -> list[T]:
        return await asyncio.gather(*passes)

    with torch.no_grad():  # transformers' own weights ask for gradients
        return asyncio.run(together())


def _groups(each: Iterable[T], tokens: int) -> Iterator[list[T]]:
    """As many at once as `IN_STEP` allows of so many tokens."""
    left = iter(each)
    while group := list(islice(left, max(1, IN_STEP // tokens))):
        yield group


def _normalized(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, in the logits' place."""
    for rows in logits.split(_ROWS):
        rows.copy_(torch.log_softmax(rows, 1))
    return logits


def divergence(reference: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    """Mean KL divergence, nats a token, of two `log_probabilities`, each of which is gone through once."""
    total, tokens = 0.0, 0
    for exact, changed in zip(reference, other, strict=True):
        total += _divergence(exact, changed)
        tokens += len(exact)
    return total / tokens


def _divergence(exact: torch.Tensor, changed: torch.Tensor) -> float:
    """Nats of all tokens together."""
    total = 0.0
    for p, q in zip(exact.split(_ROWS), changed.split(_ROWS), strict=True):
        total += float((p.exp() * (p - q)).sum(1).double().sum())
    return total
