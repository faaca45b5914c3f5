"""Multi-head latent attention as a layer of the lean trunk: its projections around the native attention."""

import math
from typing import Any

import torch

from moehive.kernels.layer import Mixer
from moehive.kernels.linear import LinearWeights
from moehive.kernels.mla import Mla, MlaLayer

from .batch import Batch, Ops

LATENT_EPS = 1e-6  # of the norms over latents, whatever the config says for the others


class LatentAttention:
    """See Attention. The cache holds one latent and one rotary key for a token."""

    def __init__(
        self,
        ops: Ops,
        layer: MlaLayer,
        group: int,
        queries: LinearWeights,
        query_norm: torch.Tensor | None,
        query_latent: LinearWeights | None,
        compress: LinearWeights,
        output: LinearWeights,
    ) -> None:
        """Queries come from the hidden states, or from their own latent (`query_latent`, then `query_norm`).

        `compress` gives a latent and a rotary key; `group`: whose pages hold the layer's part of the cache.
        """
        self._ops = ops
        self._mla = Mla(ops.trunk, layer)
        self.mixer = Mixer(
            kind="latent",
            structure=self._mla.structure,
            owner=self._mla,
            projections=[compress] if query_latent is None else [query_latent, compress],
            output=output,
            group=group,
            queries=queries,
            query_norm=query_norm,
            query_eps=LATENT_EPS,
        )

    def forward(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        linear, mixer = self._ops.linear, self.mixer
        assert mixer.queries is not None
        first = linear.linears(mixer.projections, x, batch.room("projected", mixer.projected))
        compressed = first
        room = batch.room("queries", mixer.queries.rows)
        if mixer.query_norm is None:
            queries = linear.linear(mixer.queries, x, room)
        else:
            latent, compressed = first.split([one.rows for one in mixer.projections], dim=1)
            latent = latent.clone(memory_format=torch.contiguous_format)
            self._ops.trunk.add_norm(latent, norm=mixer.query_norm, eps=mixer.query_eps, out=latent)
            queries = linear.linear(mixer.queries, latent, room)
        absorbed = batch.room("absorbed", self._mla.layer.heads * (self._mla.layer.rank + self._mla.layer.rope))
        out = batch.room("attended", mixer.output.columns)
        self._mla(queries, compressed, batch.tables[mixer.group], batch.cos, batch.sin, absorbed, out)
        return linear.linear(mixer.output, out, batch.room("mixed", mixer.output.rows))


def latent_scale(config: Any) -> float:
    """Factor of the scores: of the head's size, and of the longer context where the config says so (YaRN)."""
    scale: float = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
    return scale
