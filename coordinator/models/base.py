"""What the engine needs of a model, and what a model needs of the cluster.

A trunk never sees the network: it awaits the `ExpertBackend` that it was given. The forward pass is a coroutine,
so two sequences are two coroutines on one loop, and one computes while the other waits for its experts.
"""

from typing import Any, Protocol

import torch


class ExpertBackend(Protocol):
    """Computes routed experts somewhere: in this process, on nodes, or in a test."""

    async def compute(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        `layer` is the MoE layer's ordinal; `hidden` [tokens, hidden] f32 or bf16; `ids` [tokens, k] integers,
        where an id >= the layer's number of experts means none; `weights` [tokens, k] of any float type.
        Returns [tokens, hidden] of hidden's dtype. Raises NodeUnavailable.
        """
        ...


class Trunk(Protocol):
    """All of a model but its routed experts."""

    family: str  # transformers' model_type
    vocab_size: int
    context_length: int  # tokens, prompt and answer together
    prefill_chunk: int  # tokens of a prompt in one forward pass; the whole context where chunks would be wrong

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of KV cache (and recurrent state) that a sequence of `tokens` needs."""
        ...

    def new_cache(self) -> Any:
        """An empty cache for one sequence; `forward` extends it in place."""
        ...

    async def forward(
        self, tokens: torch.Tensor, cache: Any, experts: ExpertBackend, all_logits: bool = False
    ) -> torch.Tensor:
        """Runs `tokens` [T] (int64) after what `cache` holds.

        Returns f32 logits [vocab] of the last token, or [T, vocab] with `all_logits`. Raises what the backend
        raises; the cache is then no longer usable. Cancellation takes effect at the next layer.
        """
        ...
