"""Attention kinds: each takes a pass's normed hidden states and returns what is added to the residual stream."""

from typing import Protocol

import torch

from moehive.kernels.fused import FusedAttention
from moehive.kernels.linear import FEW_TOKENS, LinearWeights
from moehive.kernels.trunk_ops import AttentionLayer

from .batch import Batch, Ops


class Attention(Protocol):
    """One layer's way to mix tokens."""

    def forward(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        """`x` f32 [T, hidden] → f32 [T, hidden]; extends the caches of the batch's sequences."""
        ...


class SoftmaxAttention:
    """Grouped-query attention over the paged KV cache."""

    def __init__(
        self, ops: Ops, layer: AttentionLayer, group: int, projections: list[LinearWeights], output: LinearWeights
    ) -> None:
        """`projections`: queries, keys, values; `group`: whose pages hold the layer's part of the cache."""
        self._ops = ops
        self._layer = layer  # keeps the tensors alive that `_native` points to
        self._native = layer.structure()
        self._group = group
        self._projections = projections
        self._output = output
        self._width = layer.heads * layer.head_dim
        self._fused = FusedAttention(ops.trunk, projections, layer, output)

    def forward(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        if batch.tokens <= FEW_TOKENS:
            return self._fused(x, batch.tables[self._group], batch.cos, batch.sin)
        linear = self._ops.linear
        rows = linear.linears(self._projections, x)
        out = torch.empty(batch.tokens, self._width)
        self._ops.trunk.attend(self._native, rows, batch.tables[self._group], batch.cos, batch.sin, out)
        return linear.linear(self._output, out)
