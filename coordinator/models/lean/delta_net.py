"""Gated DeltaNet as a layer of the lean trunk: its projections around the native recurrence."""

import torch

from moehive.kernels.delta_net import DeltaNet, DeltaNetLayer, DeltaNetState
from moehive.kernels.fused import FusedDeltaNet
from moehive.kernels.linear import FEW_TOKENS, LinearWeights

from .batch import Batch, Ops
from .cache import CacheLayout


class DeltaNetAttention:
    """See Attention. Keeps two states of a fixed size for each sequence, whatever its length."""

    def __init__(
        self,
        ops: Ops,
        layer: DeltaNetLayer,
        cache: CacheLayout,
        projections: list[LinearWeights],
        output: LinearWeights,
    ) -> None:
        """`projections`: those whose outputs, one after the other, are a row as `layer` says."""
        self._ops = ops
        self._net = DeltaNet(ops.trunk, layer)
        self._conv = cache.add_state(*layer.conv_shape)
        self._recurrent = cache.add_state(*layer.recurrent_shape)
        self._projections = projections
        self._output = output
        self._fused = FusedDeltaNet(ops.trunk, projections, self._net, output)

    def forward(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        states = [
            DeltaNetState(span.cache.states[self._conv], span.cache.states[self._recurrent]) for span in batch.spans
        ]
        if batch.tokens <= FEW_TOKENS:
            return self._fused(x, batch.sequences, states)
        linear = self._ops.linear
        rows = linear.linears(self._projections, x)
        out = torch.empty(batch.tokens, self._output.columns)
        self._net(rows, batch.sequences, states, out)
        return linear.linear(self._output, out)
