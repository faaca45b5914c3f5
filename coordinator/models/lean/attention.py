"""Attention kinds: each takes a pass's normed hidden states and returns what is added to the residual stream."""

from typing import Protocol

import torch

from moehive.kernels.geometry import GeometryError
from moehive.kernels.layer import Mixer
from moehive.kernels.linear import LinearWeights
from moehive.kernels.trunk_ops import AttentionLayer

from .batch import Batch, Ops


class Attention(Protocol):
    """One layer's way to mix tokens."""

    @property
    def mixer(self) -> Mixer:
        """The same as `forward`, described for one native call with the rest of the layer."""
        ...

    def forward(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        """`x` f32 [T, hidden] → f32 [T, hidden], in a room of the batch: the next layer's takes its place.

        Extends the caches of the batch's sequences.
        """
        ...


class SoftmaxAttention:
    """Grouped-query attention over the paged KV cache."""

    def __init__(
        self, ops: Ops, layer: AttentionLayer, group: int, projections: list[LinearWeights], output: LinearWeights
    ) -> None:
        """`projections`: queries, keys, values; `group`: whose pages hold the layer's part of the cache.

        Raises GeometryError for projections of other heads.
        """
        rows = sum(one.rows for one in projections)
        fit = all(one.columns == output.rows for one in projections)
        if rows != layer.row or output.columns != layer.heads * layer.head_dim or not fit:
            raise GeometryError(
                f"A layer's projections of {rows} rows and {output.columns} columns do not fit {layer.heads} heads "
                f"and {layer.kv_heads} of keys with {layer.head_dim} numbers each."
            )
        self._ops = ops
        self._native = layer.structure()
        self.mixer = Mixer(
            kind="softmax",
            structure=self._native,
            owner=layer,
            projections=projections,
            output=output,
            group=group,
        )

    def forward(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        linear, mixer = self._ops.linear, self.mixer
        rows = linear.linears(mixer.projections, x, batch.room("projected", mixer.projected))
        out = batch.room("attended", mixer.output.columns)
        self._ops.trunk.attend(self._native, rows, batch.tables[mixer.group], batch.cos, batch.sin, out)
        return linear.linear(mixer.output, out, batch.room("mixed", mixer.output.rows))
