"""The trunks that `moehive bench trunk` measures: families, shapes, formats."""

from typing import Any, NamedTuple

from moehive.kernels.formats.registry import FORMATS

PROMPT = 128  # tokens in the cache before the first that is timed
_LONG_PROMPT, _LONG_LAYERS = 4096, 8
SMALL: dict[str, Any] = {  # what the layers are asked for is their width; the rest as little as goes
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 8,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
# The routed experts are computed elsewhere: they are one wide here, so that they take no memory. All layers together
# are far larger than caches.
_REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5-35b": ("qwen3_5_moe_text", {
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "num_hidden_layers": 4, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 1,
        "shared_expert_intermediate_size": 512, "linear_num_value_heads": 32, "linear_num_key_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    }),
    "qwen3-30b": ("qwen3_moe", {
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_hidden_layers": 16, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1,
    }),
}  # fmt: skip
SMALL_FAMILIES = ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "deepseek_v3", "gpt_oss", "glm4_moe")
_REAL_FORMATS = ("bf16", "q8_0", "q4_0", "q4_k", "q6_k", "fp8_block")


class Case(NamedTuple):
    """One trunk to be measured with `prompt` tokens in the cache; tokens in a repetition, of transformers' layers
    `eager_tokens`."""

    shape: str
    family: str
    config: dict[str, Any]
    formats: tuple[str, ...]
    tokens: int
    eager_tokens: int
    prompt: int = PROMPT


def cases(quick: bool) -> list[Case]:
    """The trunks that are measured."""
    small = SMALL_FAMILIES[:1] if quick else SMALL_FAMILIES
    real = list(_REAL)[:1] if quick else list(_REAL)
    formats = tuple(fmt for fmt in (_REAL_FORMATS[:3] if quick else _REAL_FORMATS) if fmt in FORMATS)
    found = [Case("64 wide", family, SMALL, ("f32",), 40, 10) for family in small]
    for name in real:
        family, config = _REAL[name]
        found.append(Case(name, family, config, formats, 96 // config["num_hidden_layers"], 1))
    if not quick:
        family, config = _REAL["qwen3-30b"]
        long = config | {"num_hidden_layers": _LONG_LAYERS}
        found.append(Case("qwen3-30b", family, long, ("q4_0",), 12, 1, _LONG_PROMPT))
    return found
