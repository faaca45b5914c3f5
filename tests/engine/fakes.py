"""A trunk and experts for tests: no weights, a next token that depends on every token before it."""

import asyncio
from collections.abc import Callable, Sequence

import torch

from moehive.coordinator.models.base import SequenceInput

HIDDEN = 4


def next_logits(history: Sequence[int], vocab_size: int) -> torch.Tensor:
    """f32 [vocab_size], the same for the same history and different for any other."""
    seed = 0
    for token in history:
        seed = (seed * 1_000_003 + token + 1) % (1 << 61)
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


class FakeExperts:
    """Gives hidden states back after the loop has gone round once."""

    def __init__(self) -> None:
        self.calls = 0
        self.gate = asyncio.Event()  # cleared: computations wait
        self.gate.set()
        self.fail_at: dict[int, Exception] = {}  # number of the call → what it raises

    async def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        number = self.calls
        self.calls += 1
        await asyncio.sleep(0)
        await self.gate.wait()
        if number in self.fail_at:
            raise self.fail_at[number]
        return hidden


class History(list[int]):
    """The cache of one sequence: its tokens, and how many of them were the prompt (for scripts)."""

    prompt: int | None = None


class FakeTrunk:
    """Keeps the history as its cache; `choose` (history → next token) replaces the random logits."""

    family = "fake"

    def __init__(
        self,
        vocab_size: int = 50,
        context_length: int = 256,
        prefill_chunk: int = 8,
        layers: int = 3,
        choose: Callable[[History], int] | None = None,
        max_sequences: int = 1,
    ) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.prefill_chunk = prefill_chunk
        self.layers = layers
        self.choose = choose
        self.max_sequences = max_sequences
        self.caches: set[int] = set()  # those not freed
        self.batches: list[int] = []  # sequences of each forward pass, in the order of their ends
        self.steps: list[tuple[int, ...]] = []  # the tokens of each sequence's part of them
        self.nan_after: int | None = None  # history this long gives NaN

    def cache_bytes(self, tokens: int) -> int:
        return 100 * tokens

    def new_cache(self) -> History:
        cache = History()
        self.caches.add(id(cache))
        return cache

    def free_cache(self, cache: History) -> None:
        self.caches.remove(id(cache))  # given twice, or never made, is an error

    async def forward(self, batch: Sequence[SequenceInput], experts: FakeExperts) -> list[torch.Tensor]:
        assert 1 <= len(batch) <= self.max_sequences
        for one in batch:
            assert id(one.cache) in self.caches, "a cache that was freed"
            assert (
                one.tokens.dtype == torch.int64 and 1 <= len(one.tokens) <= self.prefill_chunk and not one.all_logits
            )
        tokens = torch.cat([one.tokens for one in batch])
        routing = torch.zeros(len(tokens), 1)
        for layer in range(self.layers):
            hidden = (tokens * self.layers + layer).float()[:, None].expand(-1, HIDDEN)
            back = await experts.submit(layer, hidden, routing.long(), routing)
            assert torch.equal(back, hidden), "another batch's rows"
        self.batches.append(len(batch))
        return [self._end(one.tokens, one.cache) for one in batch]

    def _end(self, tokens: torch.Tensor, cache: History) -> torch.Tensor:
        cache.extend(tokens.tolist())
        assert len(cache) <= self.context_length
        self.steps.append(tuple(tokens.tolist()))
        if self.nan_after is not None and len(cache) >= self.nan_after:
            return torch.full((self.vocab_size,), torch.nan)
        if self.choose is None:
            return next_logits(cache, self.vocab_size)
        return torch.nn.functional.one_hot(torch.tensor(self.choose(cache)), self.vocab_size) * 50.0


async def until(condition: Callable[[], bool], deadline_s: float = 10) -> None:
    """Lets the loop run until `condition` holds; fails at the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - it may hang on anything, not on one event
            await asyncio.sleep(0.001)
