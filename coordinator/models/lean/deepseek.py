"""DeepSeek-V3, and Kimi K2 whose language model is the same: latent attention, dense first layers, grouped router."""

from moehive.kernels.mla import MlaLayer

from .builder import Builder
from .latent import LATENT_EPS, LatentAttention, latent_scale
from .mlp import Mlp
from .parts import Layer
from .rope import Rope


def _attention(b: Builder, name: str) -> LatentAttention:
    config = b.config
    group = b.cache.group(None)
    layer = MlaLayer(
        heads=config.num_attention_heads,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        rank=config.kv_lora_rank,
        value=config.v_head_dim,
        scale=latent_scale(config),
        # Each head has a vector of its own to multiply, which is not a linear layer's product: not in the file's
        # format if that is a quantized one.
        up=b.tensor(f"{name}.kv_b_proj.weight").to(b.tensors.dtype),
        norm=b.tensor(f"{name}.kv_a_layernorm.weight"),
        norm_eps=LATENT_EPS,
        page_at=b.cache.page_end(group),
        dtype=b.tensors.dtype,
        interleaved=config.rope_interleave,
    )
    b.cache.add_to_page(group, layer.page_bytes)
    direct = config.q_lora_rank is None
    return LatentAttention(
        b.ops,
        layer,
        group,
        b.linear(f"{name}.q_proj" if direct else f"{name}.q_b_proj"),
        None if direct else b.norm(f"{name}.q_a_layernorm"),
        None if direct else b.linear(f"{name}.q_a_proj"),
        b.linear(f"{name}.kv_a_proj_with_mqa"),
        b.linear(f"{name}.o_proj"),
    )


def deepseek_v3(b: Builder) -> tuple[list[Layer], Rope]:
    """The layers of DeepSeek-V3."""
    config = b.config

    def mlp(n: int) -> Mlp:
        name = f"layers.{n}.mlp"
        if n < config.first_k_dense_replace:
            return b.dense(name)
        return b.moe(b.sigmoid_router(f"{name}.gate"), f"{name}.gate", f"{name}.shared_experts")

    layers = [
        Layer(
            b.norm(f"layers.{n}.input_layernorm"),
            _attention(b, f"layers.{n}.self_attn"),
            b.norm(f"layers.{n}.post_attention_layernorm"),
            mlp(n),
        )
        for n in range(config.num_hidden_layers)
    ]
    return layers, b.rope()
