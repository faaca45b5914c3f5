"""What the engine needs of a model, and what a model needs of the cluster.

A trunk never sees the network: it submits to the `ExpertBackend` that it was given and awaits the answer. The
forward pass is a coroutine, so two sequences are two coroutines on one loop, and one computes while the other waits
for its experts.
"""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch


class ExpertBackend(Protocol):
    """Computes routed experts somewhere: in this process, on nodes, or in a test."""

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        """Asks for the weighted sum of each token's experts; call it on the event loop's thread.

        The messages leave at once, so the caller may compute something else before it awaits the sum. Whoever does
        not want it any more just drops what was returned.

        `layer` is the MoE layer's ordinal; `hidden` [tokens, hidden] f32 or bf16; `ids` [tokens, k] integers,
        where an id >= the layer's number of experts means none; `weights` [tokens, k] of any float type. All three
        stay as they are until the sum has been awaited, and no longer.
        Gives [tokens, hidden] of hidden's dtype. Raises NodeUnavailable, here or when awaited.
        """
        ...


class NoExperts:
    """An ExpertBackend that adds nothing, at once."""

    async def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See ExpertBackend."""
        return torch.zeros_like(hidden)


class Tiers(Protocol):
    """What a backend knows of nodes that keep experts on disk."""

    margin: float  # of cache-aware routing; 0: off
    slow: bool  # whether there is such a node

    def expect(self, layers: Sequence[Sequence[int]]) -> None:
        """The layers after the one that is submitted next may ask for these experts, each likeliest first."""
        ...

    def on_disk(self, layer: int) -> npt.NDArray[np.bool_] | None:
        """For each expert of a layer whether it would have to be read first; None: not known."""
        ...


def tiers_of(experts: ExpertBackend) -> Tiers | None:
    """The `tiers` of a backend that has them and whose nodes keep experts on disk; None for all others."""
    tiers: Tiers | None = getattr(experts, "tiers", None)
    return tiers if tiers is not None and tiers.slow else None


def take_back_of(experts: ExpertBackend) -> Callable[[torch.Tensor], None] | None:
    """The `take_back` of a backend that has one: it is given sums that their caller, and all else, is done with."""
    take_back: Callable[[torch.Tensor], None] | None = getattr(experts, "take_back", None)
    return take_back


@dataclass(frozen=True, slots=True, eq=False)
class SequenceInput:
    """One sequence's part of a forward pass."""

    tokens: torch.Tensor  # int64 [T], to run after what `cache` holds
    cache: Any  # of the trunk's `new_cache`, extended in place
    all_logits: bool = False  # logits of every token, not of the last one only


class Trunk(Protocol):
    """All of a model but its routed experts."""

    family: str  # transformers' model_type
    vocab_size: int
    context_length: int  # tokens, prompt and answer together
    prefill_chunk: int  # tokens of a prompt in one forward pass; the whole context where chunks would be wrong
    max_sequences: int  # sequences in one forward pass
    cache_room: int | None  # bytes for all sequences' caches, where they do not lie in main memory

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of KV cache (and recurrent state) that a sequence of `tokens` needs."""
        ...

    def new_cache(self) -> Any:
        """An empty cache for one sequence; `forward` extends it in place."""
        ...

    def free_cache(self, cache: Any) -> None:
        """Gives back what `cache` holds; it is not used any more. No forward pass with it may be running."""
        ...

    async def forward(self, batch: Sequence[SequenceInput], experts: ExpertBackend) -> list[torch.Tensor]:
        """Runs each sequence's tokens after what its cache holds; 1 to `max_sequences` sequences of any lengths.

        Returns for each sequence f32 logits [vocab] of its last token, or [T, vocab] with `all_logits`. Raises what
        the backend raises; the caches of the batch are then no longer usable, except to be freed. Cancellation
        takes effect at the next layer.
        """
        ...


def without_waiting(passing: Coroutine[Any, Any, list[torch.Tensor]]) -> list[torch.Tensor]:
    """What a `forward` gives whose experts answer at once, without an event loop. Raises RuntimeError if it waits."""
    try:
        passing.send(None)
    except StopIteration as done:
        result: list[torch.Tensor] = done.value
        return result
    passing.close()
    raise RuntimeError("A pass waited, though its experts answer at once.")
