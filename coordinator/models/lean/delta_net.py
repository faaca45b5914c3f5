"""Gated DeltaNet as a layer of the lean trunk: its projections around the native recurrence."""

import torch

from moehive.kernels.delta_net import DeltaNet, DeltaNetLayer, DeltaNetState
from moehive.kernels.layer import Mixer
from moehive.kernels.linear import LinearWeights

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
        self.mixer = Mixer(
            kind="delta_net",
            structure=self._net.structure,
            owner=self._net,
            projections=projections,
            output=output,
            states=(cache.add_state(*layer.conv_shape), cache.add_state(*layer.recurrent_shape)),
        )

    def forward(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        linear, mixer = self._ops.linear, self.mixer
        conv, recurrent = mixer.states
        states = [DeltaNetState(span.cache.states[conv], span.cache.states[recurrent]) for span in batch.spans]
        rows = linear.linears(mixer.projections, x, batch.room("projected", mixer.projected))
        convolved = batch.room("convolved", self._net.layer.channels)
        out = batch.room("attended", mixer.output.columns)
        self._net(rows, batch.sequences, states, convolved, out)
        return linear.linear(mixer.output, out, batch.room("mixed", mixer.output.rows))
