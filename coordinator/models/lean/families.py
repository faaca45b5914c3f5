"""The families that have a lean trunk: what of their configs is known, and how their layers are put together."""

from collections.abc import Callable
from typing import Any

from moehive.kernels.delta_net import MAX_KEY_DIM, MAX_TAPS
from moehive.kernels.mla import MAX_HEAD_PART, MAX_RANK
from moehive.kernels.trunk_ops import MAX_HEAD, RouterLayer

from ..tensors import TensorSource
from .attention import Attention
from .batch import Ops
from .builder import ACTIVATIONS, Builder, head_dim_of
from .deepseek import deepseek_v3
from .mlp import Mlp
from .parts import Layer, Parts
from .qwen_hybrid import qwen3_5_moe, qwen3_next
from .rope import KNOWN
from .trunk import LeanTrunk

Build = Callable[[Builder], list[Layer]]


def unknown(config: Any) -> str | None:
    """Why there is no lean trunk for a config (transformers' own object), in a few words; None if there is one."""
    family = config.model_type
    if family not in FAMILIES:
        return f"there is none for the family {family}"
    if config.hidden_act not in ACTIVATIONS:
        return f"its activation {config.hidden_act} is not known"
    rope_type = (config.rope_parameters or {}).get("rope_type")
    if rope_type not in KNOWN:
        return f"its rope type {rope_type} is not known"
    if head_dim_of(config) > MAX_HEAD:
        return f"heads of {head_dim_of(config)} numbers are too large"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < 0:
        return f"its window of {window} tokens is not known"
    kinds = {"full_attention", "sliding_attention"} | ({"linear_attention"} if family in HYBRID else set())
    if len(set(getattr(config, "layer_types", None) or ()) - kinds):
        return "it has layers of another kind"
    return _too_large(config)


def _too_large(config: Any) -> str | None:
    """As `unknown`, for the sizes that the kernels of recurrent and of latent attention have room for."""
    if config.model_type in HYBRID:
        keys, taps = config.linear_key_head_dim, config.linear_conv_kernel_dim
        if keys > MAX_KEY_DIM or not 2 <= taps <= MAX_TAPS:
            return f"recurrent layers with heads of {keys} keys and {taps} taps do not fit its kernel"
    if config.model_type == "deepseek_v3":
        rank, nope, rope = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        if rank > MAX_RANK or max(nope, rope) > MAX_HEAD_PART or rope % 2:
            return f"latent attention of rank {rank} with heads of {nope} and {rope} numbers does not fit its kernel"
    return None


def build(config: Any, tensors: TensorSource, ops: Ops) -> LeanTrunk:
    """The trunk of a config for which `unknown` says nothing. Raises CoordinatorError for missing tensors."""
    return LeanTrunk(read(config, tensors, ops), ops)


def read(config: Any, tensors: TensorSource, ops: Ops) -> Parts:
    """What a trunk of such a config is made of, its weights in memory. Raises as `build` does."""
    # A model that also sees keeps its language model one level deeper.
    inner = "model.language_model."
    prefix = inner if f"{inner}embed_tokens.weight" in tensors else "model."
    builder = Builder(config, tensors, ops, prefix)
    layers = FAMILIES[config.model_type](builder)
    embedding, head = builder.embedding_and_head()
    return Parts(
        family=config.model_type,
        context_length=config.max_position_embeddings,
        embedding=embedding,
        layers=layers,
        norm=builder.norm("norm"),
        head=head,
        eps=config.rms_norm_eps,
        rope=builder.rope,
        cache=builder.cache,
        dtype=tensors.dtype,
    )


def _mixtral(b: Builder) -> list[Layer]:
    config = b.config
    router = RouterLayer(
        experts=config.num_local_experts, top_k=config.num_experts_per_tok, scores="softmax", renormalize=True
    )
    return b.layers(
        lambda n: b.attention(f"layers.{n}.self_attn", config.sliding_window),
        lambda n: b.moe(router, f"layers.{n}.mlp.gate"),
    )


def _qwen3_moe(b: Builder) -> list[Layer]:
    config = b.config
    router = RouterLayer(
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        scores="softmax",
        renormalize=config.norm_topk_prob,
    )

    def mlp(n: int) -> Mlp:
        sparse = n not in config.mlp_only_layers and (n + 1) % config.decoder_sparse_step == 0
        return b.moe(router, f"layers.{n}.mlp.gate") if sparse else b.dense(f"layers.{n}.mlp")

    return b.layers(lambda n: b.attention(f"layers.{n}.self_attn", config.sliding_window, norms=True), mlp)


def _glm4_moe(b: Builder) -> list[Layer]:
    config = b.config
    return b.layers(lambda n: b.attention(f"layers.{n}.self_attn", norms=config.use_qk_norm), b.moe_after_dense)


def _gpt_oss(b: Builder) -> list[Layer]:
    config = b.config
    router = RouterLayer(
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        scores="chosen_softmax",
        renormalize=True,
    )

    def attention(n: int) -> Attention:
        window = config.sliding_window if config.layer_types[n] == "sliding_attention" else None
        return b.attention(f"layers.{n}.self_attn", window, sinks=True)

    return b.layers(attention, lambda n: b.moe(router, f"layers.{n}.mlp.router"))


HYBRID = ("qwen3_next", "qwen3_5_moe_text")  # the families with recurrent layers that we know
FAMILIES: dict[str, Build] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "qwen3_next": qwen3_next,
    "qwen3_5_moe_text": qwen3_5_moe,
    "deepseek_v3": deepseek_v3,
}
