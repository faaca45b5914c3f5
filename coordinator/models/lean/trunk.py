"""The lean trunk: wiring of native operations. Passes of few tokens are short_pass.py's."""

from collections.abc import Sequence

import torch

from moehive.kernels.linear import FEW_TOKENS

from ... import timeline
from ..base import ExpertBackend, SequenceInput
from .batch import Batch, Ops
from .cache import SequenceCache
from .parts import Parts
from .short_pass import ShortPasses

PREFILL_CHUNK = 512  # tokens; bounds how long one prompt holds the loop
# Up to here a decode step's products, the experts' too, are native, and a row's bits do not depend on the others.
MAX_SEQUENCES = FEW_TOKENS


class LeanTrunk:
    """`models.base.Trunk` of the families that `lean/families.py` knows."""

    def __init__(self, parts: Parts, ops: Ops) -> None:
        self.family = parts.family
        self.vocab_size = parts.head.rows
        self.context_length = parts.context_length
        self.prefill_chunk = min(PREFILL_CHUNK, parts.context_length)
        self.max_sequences = MAX_SEQUENCES
        self.cache_room: int | None = None
        self._parts = parts
        self._ops = ops
        self._short = ShortPasses(parts, ops)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of KV cache and states of a sequence of `tokens`."""
        return self._parts.cache.nbytes(tokens, self.prefill_chunk)

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        return self._parts.cache.new()

    def free_cache(self, cache: SequenceCache) -> None:
        """Gives the pages back to their pools."""
        cache.clear()

    async def forward(self, batch: Sequence[SequenceInput], experts: ExpertBackend) -> list[torch.Tensor]:
        """See `Trunk.forward`. All arithmetic is f32; a token's experts are asked with those of the whole batch."""
        run = Batch(batch, self._parts.rope, self._ops)
        logits = await (self._short.forward if run.tokens <= FEW_TOKENS else self._forward)(run, experts)
        run.finish()
        parts = [logits] if len(batch) == 1 else logits.split(run.counts)
        return [part if one.all_logits else part[0] for one, part in zip(batch, parts, strict=True)]

    async def _forward(self, run: Batch, experts: ExpertBackend) -> torch.Tensor:
        """f32 logits [len(run.wanted), vocab] of a pass of many tokens."""
        parts, ops = self._parts, self._ops
        add_norm, eps = ops.trunk.add_norm, parts.eps
        hidden = parts.embedding.rows(run.ids)
        x = torch.empty_like(hidden)
        half = None if parts.dtype == torch.float32 else torch.empty(hidden.shape, dtype=torch.bfloat16)
        for layer in parts.layers:
            with timeline.current.span("attention"):
                add_norm(hidden, norm=layer.attention_norm, eps=eps, out=x)
                mixed = layer.attention.forward(run, x)
                add_norm(hidden, mixed, norm=layer.mlp_norm, eps=eps, out=x, half_out=half)
            add, more, gate = await layer.mlp.forward(x, x if half is None else half, experts)
            add_norm(hidden, add, more, gate)
        with timeline.current.span("lm head"):
            last = hidden[run.wanted]
            add_norm(last, norm=parts.norm, eps=eps, out=last)
            return ops.linear.linear(parts.head, last)
