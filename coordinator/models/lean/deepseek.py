"""DeepSeek-V3, and Kimi K2 whose language model is the same: latent attention, dense first layers, grouped router."""

from moehive.kernels.mla import MlaLayer

from .builder import Builder
from .latent import LATENT_EPS, LatentAttention, latent_scale
from .parts import Layer


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


def deepseek_v3(b: Builder) -> list[Layer]:
    """The layers of DeepSeek-V3."""
    return b.layers(lambda n: _attention(b, f"layers.{n}.self_attn"), b.moe_after_dense)
