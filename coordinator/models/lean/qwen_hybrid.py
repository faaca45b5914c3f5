"""Qwen3-Next and Qwen3.5-MoE: Gated DeltaNet in most layers, gated softmax attention in the others.

Their norms are stored as the difference from one. The two differ in how DeltaNet's projections are joined.
"""

from typing import Any

from moehive.kernels.delta_net import DeltaNetLayer
from moehive.kernels.trunk_ops import RouterLayer

from .attention import Attention
from .builder import Builder
from .delta_net import DeltaNetAttention
from .mlp import Mlp
from .parts import Layer


def _delta_net(b: Builder, name: str, projections: list[str]) -> DeltaNetAttention:
    config = b.config
    columns = b.tensors.column_order(f"{b.prefix}{name}.out_proj.weight")
    size = config.linear_value_head_dim
    layer = DeltaNetLayer(
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=size,
        grouped=len(projections) == 2,
        conv=b.tensor(f"{name}.conv1d.weight").squeeze(1).T.contiguous(),
        decay=-b.tensor(f"{name}.A_log").exp(),
        dt_bias=b.tensor(f"{name}.dt_bias"),
        norm=b.tensor(f"{name}.norm.weight"),
        norm_eps=config.rms_norm_eps,
        out_order=None if columns is None else tuple((columns[::size] // size).tolist()),
    )
    inputs = [b.linear(f"{name}.{projection}") for projection in projections]
    return DeltaNetAttention(b.ops, layer, b.cache, inputs, b.linear(f"{name}.out_proj"))


def _layers(b: Builder, projections: list[str], renormalize: bool) -> list[Layer]:
    config = b.config
    b.norm_offset = 1.0
    router = RouterLayer(
        experts=config.num_experts, top_k=config.num_experts_per_tok, scores="softmax", renormalize=renormalize
    )
    dense: Any = getattr(config, "mlp_only_layers", ())
    step: int = getattr(config, "decoder_sparse_step", 1)

    def attention(n: int) -> Attention:
        if config.layer_types[n] == "linear_attention":
            return _delta_net(b, f"layers.{n}.linear_attn", projections)
        return b.attention(f"layers.{n}.self_attn", gated=True, norms=True)

    def mlp(n: int) -> Mlp:
        name = f"layers.{n}.mlp"
        if n in dense or (n + 1) % step:
            return b.dense(name)
        return b.moe(router, f"{name}.gate", f"{name}.shared_expert", f"{name}.shared_expert_gate")

    return b.layers(attention, mlp)


def qwen3_next(b: Builder) -> list[Layer]:
    """The layers of Qwen3-Next."""
    return _layers(b, ["in_proj_qkvz", "in_proj_ba"], b.config.norm_topk_prob)


def qwen3_5_moe(b: Builder) -> list[Layer]:
    """The layers of Qwen3.5-MoE's language model."""
    return _layers(b, ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"], True)
