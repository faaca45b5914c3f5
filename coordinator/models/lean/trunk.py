"""The lean trunk: wiring of native operations, a handful of calls a layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moehive.kernels.linear import FEW_TOKENS, LinearWeights

from ... import timeline
from ..base import ExpertBackend, SequenceInput, tiers_of
from ..tensors import Embedding
from .attention import Attention
from .batch import Batch, Ops
from .cache import CacheLayout, SequenceCache
from .foresight import FEW_TOKENS as FORESEEN_TOKENS
from .foresight import LAYERS as FORESEEN_LAYERS
from .mlp import Mlp, MoeMlp
from .rope import Rope

PREFILL_CHUNK = 512  # tokens; bounds how long one prompt holds the loop
# Up to here a decode step's products, the experts' too, are native, and a row's bits do not depend on the others.
MAX_SEQUENCES = FEW_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One decoder layer; norms are f32 [hidden]."""

    attention_norm: torch.Tensor
    attention: Attention
    mlp_norm: torch.Tensor
    mlp: Mlp


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parts:
    """What a family's builder gives."""

    family: str
    context_length: int
    embedding: Embedding
    layers: list[Layer]
    norm: torch.Tensor  # f32 [hidden], after the last layer
    head: LinearWeights
    eps: float  # of all norms over the hidden size
    rope: Rope | None
    cache: CacheLayout
    dtype: torch.dtype  # of the hidden states that travel to the experts


class LeanTrunk:
    """`models.base.Trunk` of the families that `lean/families.py` knows."""

    def __init__(self, parts: Parts, ops: Ops) -> None:
        self.family = parts.family
        self.vocab_size = parts.head.rows
        self.context_length = parts.context_length
        self.prefill_chunk = min(PREFILL_CHUNK, parts.context_length)
        self.max_sequences = MAX_SEQUENCES
        self._parts = parts
        self._ops = ops
        norms = [layer.attention_norm for layer in parts.layers[1:]]
        self._next_norms: list[torch.Tensor | None] = [*norms, None]
        with_experts = [(number, layer) for number, layer in enumerate(parts.layers) if isinstance(layer.mlp, MoeMlp)]
        self._foreseen: list[list[Layer]] = [  # the next layers that have experts
            [layer for later, layer in with_experts if later > number][:FORESEEN_LAYERS]
            for number in range(len(parts.layers))
        ]

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of KV cache and states of a sequence of `tokens`."""
        return self._parts.cache.nbytes(tokens, self.prefill_chunk)

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        return self._parts.cache.new()

    def free_cache(self, cache: SequenceCache) -> None:
        """Gives the pages back to their pools."""
        for table in cache.tables:
            table.clear()
        cache.states = []

    async def forward(self, batch: Sequence[SequenceInput], experts: ExpertBackend) -> list[torch.Tensor]:
        """See `Trunk.forward`. All arithmetic is f32; a token's experts are asked with those of the whole batch."""
        parts, add_norm = self._parts, self._ops.trunk.add_norm
        eps = parts.eps
        run = Batch(batch, parts.rope, self._ops)
        hidden = parts.embedding.rows(run.ids)
        x = torch.empty_like(hidden)
        half = None if parts.dtype == torch.float32 else torch.empty(hidden.shape, dtype=torch.bfloat16)
        sent = x if half is None else half
        add_norm(hidden, norm=parts.layers[0].attention_norm, eps=eps, out=x)
        for layer, next_norm, foreseen in zip(parts.layers, self._next_norms, self._foreseen, strict=True):
            with timeline.current.span("attention"):
                mixed = layer.attention.forward(run, x)
                add_norm(hidden, mixed, norm=layer.mlp_norm, eps=eps, out=x, half_out=half)
            if foreseen and len(x) <= FORESEEN_TOKENS and (tiers := tiers_of(experts)) is not None:
                with timeline.current.span("foresee"):
                    tiers.expect([self._likely(later, hidden) for later in foreseen])
            add, more, gate = await layer.mlp.forward(x, sent, experts)
            add_norm(hidden, add, more, gate, norm=next_norm, eps=eps, out=x)
        run.finish()
        with timeline.current.span("lm head"):
            return self._logits(batch, run, hidden)

    def _likely(self, layer: Layer, hidden: torch.Tensor) -> list[int]:
        """Experts that `layer` may ask for, judged by the residual stream `hidden` of an earlier one."""
        assert isinstance(layer.mlp, MoeMlp)
        x = torch.empty_like(hidden)
        self._ops.trunk.add_norm(hidden, norm=layer.mlp_norm, eps=self._parts.eps, out=x)
        return layer.mlp.foresee(x)

    def _logits(self, batch: Sequence[SequenceInput], run: Batch, hidden: torch.Tensor) -> list[torch.Tensor]:
        rows = [
            hidden[span.first if one.all_logits else span.first + span.tokens - 1 : span.first + span.tokens]
            for one, span in zip(batch, run.spans, strict=True)
        ]
        wanted = rows[0].clone() if len(rows) == 1 else torch.cat(rows)
        self._ops.trunk.add_norm(wanted, norm=self._parts.norm, eps=self._parts.eps, out=wanted)
        logits = self._ops.linear.linear(self._parts.head, wanted)
        parts = logits.split([len(part) for part in rows])
        return [part if one.all_logits else part[0] for one, part in zip(batch, parts, strict=True)]
