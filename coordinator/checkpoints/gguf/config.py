"""A GGUF's metadata as transformers' own config: one small table for each architecture that llama.cpp names.

The keys are llama.cpp's (src/llama-arch.cpp), what they mean is what its converter writes (conversion/*.py,
`set_gguf_parameters`). What it leaves out is what the architecture's code in llama.cpp assumes (src/models/*.cpp).
"""

import math
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from moehive.kernels.geometry import MAX_LAYERS

from ...types import CoordinatorError
from .file import GgufFile

_SIGMOID = 2  # of expert_gating_func; llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
_ROPE_TYPES = (None, "none", "linear", "yarn")


class Metadata:
    """The values of a file's own architecture, read with their kind checked."""

    def __init__(self, file: GgufFile) -> None:
        """Raises CoordinatorError when the file names no architecture."""
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CoordinatorError(f"{file.path} names no architecture, so it is not a model; download it again.")
        self.architecture = architecture

    def has(self, key: str) -> bool:
        """Whether the file says it."""
        return f"{self.architecture}.{key}" in self.file.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """A count. The same number for every layer counts as one number. Raises CoordinatorError."""
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if type(value) is not int or not 0 <= value <= 1 << 31:
            raise self._wrong(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises CoordinatorError."""
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self.file.metadata.get(f"{self.architecture}.{key}", default))

    def value(self, key: str) -> Any:
        """As it is in the file; None if it is not there."""
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def _wrong(self, key: str, value: Any) -> CoordinatorError:
        name = f"{self.architecture}.{key}"
        if value is None:
            return CoordinatorError(f"{self.file.path} does not say {name}; convert the model again.")
        return CoordinatorError(f"{self.file.path} says {name} = {str(value)[:60]}, which cannot be.")


def read_config(file: GgufFile) -> PreTrainedConfig:
    """The config of a file's model. Raises CoordinatorError for an architecture that is not in the table."""
    metadata = Metadata(file)
    known = _ARCHITECTURES.get(metadata.architecture)
    if known is None:
        raise CoordinatorError(
            f"{file.path} is of the architecture {metadata.architecture!r}; GGUF files are read for"
            f" {', '.join(_ARCHITECTURES)} (others as safetensors)."
        )
    if scaled := next((name for name in file.tensors if name.endswith((".scale", "rope_freqs.weight"))), None):
        raise CoordinatorError(f"{file.path} holds {scaled}, which is not supported; use another conversion.")
    family, own = known
    try:
        values = _common(metadata) | own(metadata)
        config: PreTrainedConfig = CONFIG_MAPPING[family](**values)
    except CoordinatorError:
        raise
    except Exception as error:  # a config's class may raise anything for values it does not like
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CoordinatorError(f"{file.path} does not describe a {family} model: {reason[-1].strip()}") from error
    return config


def layers_of(metadata: Metadata) -> int:
    """Layers of the model itself: block_count also counts those that predict further tokens (nextn, MTP)."""
    layers = metadata.integer("block_count") - metadata.integer("nextn_predict_layers", 0)
    if not 1 <= layers <= MAX_LAYERS:
        raise CoordinatorError(f"{metadata.file.path} claims {layers} layers, which cannot be.")
    return layers


def _common(m: Metadata) -> dict[str, Any]:
    table = m.file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CoordinatorError(f"{m.file.path} has no table of tokens (token_embd.weight); download it again.")
    heads = m.integer("attention.head_count")
    hidden = m.integer("embedding_length")
    return {
        "vocab_size": table.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": layers_of(m),
        "num_attention_heads": heads,
        "num_key_value_heads": m.integer("attention.head_count_kv", heads),
        "head_dim": m.integer("attention.key_length", hidden // max(1, heads)),
        "intermediate_size": m.integer("feed_forward_length", 0),
        "max_position_embeddings": m.integer("context_length"),
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "num_experts_per_tok": m.integer("expert_used_count"),
        "rope_parameters": _rope(m),
        "tie_word_embeddings": "output.weight" not in m.file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in m.file.tensors,
        "bos_token_id": m.file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": m.file.metadata.get("tokenizer.ggml.eos_token_id"),
        "dtype": "float32" if table.type.name == "f32" else "bfloat16",
    }


def _rope(m: Metadata) -> dict[str, Any]:
    kind = m.value("rope.scaling.type")
    if kind not in _ROPE_TYPES:
        raise CoordinatorError(f"{m.file.path} scales its rope by {kind!r}, which is not supported.")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.number("rope.freq_base", 10_000.0)}
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": m.number("rope.scaling.factor")}
    if kind == "yarn":
        rope |= {
            "original_max_position_embeddings": m.integer("rope.scaling.original_context_length"),
            "beta_fast": m.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": m.number("rope.scaling.yarn_beta_slow", 1.0),
        }
        if m.has("rope.scaling.attn_factor"):
            rope["attention_factor"] = m.number("rope.scaling.attn_factor")
    return rope


def _partial_rope(m: Metadata) -> dict[str, Any]:
    head = m.integer("attention.key_length", m.integer("embedding_length") // m.integer("attention.head_count"))
    return _rope(m) | {"partial_rotary_factor": m.integer("rope.dimension_count", head) / max(1, head)}


def _mixtral(m: Metadata) -> dict[str, Any]:
    if not m.integer("expert_count", 0):
        raise CoordinatorError(f"{m.file.path} is not a mixture-of-experts model: it has no routed experts.")
    window = m.integer("attention.sliding_window", 0)
    return {"num_local_experts": m.integer("expert_count"), "sliding_window": window or None}


def _qwen3_moe(m: Metadata) -> dict[str, Any]:
    return {
        "num_experts": m.integer("expert_count"),
        "moe_intermediate_size": m.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,  # not in the file; src/models/qwen3moe.cpp always normalizes
    }


def _qwen_hybrid(m: Metadata) -> dict[str, Any]:
    layers = layers_of(m)
    recurrent = m.value("attention.recurrent_layers")
    if not isinstance(recurrent, list) or len(recurrent) < layers:
        interval = max(1, m.integer("full_attention_interval", 4))
        recurrent = [(n + 1) % interval != 0 for n in range(layers)]
    value_heads = m.integer("ssm.time_step_rank")
    return _qwen3_moe(m) | {
        "rope_parameters": _partial_rope(m),
        "layer_types": ["linear_attention" if r else "full_attention" for r in recurrent[:layers]],
        "linear_conv_kernel_dim": m.integer("ssm.conv_kernel"),
        "linear_key_head_dim": m.integer("ssm.state_size"),
        "linear_value_head_dim": m.integer("ssm.inner_size") // max(1, value_heads),
        "linear_num_key_heads": m.integer("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "shared_expert_intermediate_size": m.integer(
            "expert_shared_feed_forward_length", m.integer("feed_forward_length", 0)
        ),
    }


def _sigmoid_router(m: Metadata) -> dict[str, Any]:
    return {
        "n_routed_experts": m.integer("expert_count"),
        "n_shared_experts": m.integer("expert_shared_count", 0),
        "moe_intermediate_size": m.integer("expert_feed_forward_length"),
        "first_k_dense_replace": m.integer("leading_dense_block_count", 0),
        "n_group": m.integer("expert_group_count", 1),
        "topk_group": m.integer("expert_group_used_count", 1),
        "norm_topk_prob": m.flag("expert_weights_norm", False),
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0),
    }


def _deepseek(m: Metadata) -> dict[str, Any]:
    biased = any(name.endswith(".exp_probs_b.bias") for name in m.file.tensors)  # of V3's routers alone
    if m.integer("expert_gating_func", _SIGMOID if biased else 0) != _SIGMOID:
        raise CoordinatorError(
            f"{m.file.path} is a DeepSeek model before V3 (its router is a softmax), which is not supported as GGUF."
        )
    rope = _rope(m)
    if m.has("rope.scaling.yarn_log_multiplier"):  # the converter writes 0.1 * mscale_all_dim
        mscale = m.number("rope.scaling.yarn_log_multiplier") / 0.1
        rope |= {"mscale": mscale, "mscale_all_dim": mscale}
    rotary = m.integer("rope.dimension_count")
    # Where the file keeps one head for all (MLA), key_length is that of the latent; *_mla are the real heads.
    key = m.integer("attention.key_length_mla", m.integer("attention.key_length"))
    return _sigmoid_router(m) | {
        "num_key_value_heads": m.integer("attention.head_count"),
        "head_dim": rotary,
        "q_lora_rank": m.integer("attention.q_lora_rank") if m.has("attention.q_lora_rank") else None,
        "kv_lora_rank": m.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": m.integer("attention.value_length_mla", m.integer("attention.value_length")),
        "rope_parameters": rope,
    }


def _gpt_oss(m: Metadata) -> dict[str, Any]:
    rope = _rope(m)
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # not in the file; of all gpt-oss models
    return {
        "num_local_experts": m.integer("expert_count"),
        "intermediate_size": m.integer("expert_feed_forward_length"),
        "sliding_window": m.integer("attention.sliding_window"),
        # src/models/openai-moe.cpp: load_swa_pattern(ml, 2), every second layer sees all
        "layer_types": ["full_attention" if n % 2 else "sliding_attention" for n in range(layers_of(m))],
        "rope_parameters": rope,
    }


def _glm4_moe(m: Metadata) -> dict[str, Any]:
    return _sigmoid_router(m) | {
        "rope_parameters": _partial_rope(m),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in m.file.tensors,
        "norm_topk_prob": m.flag("expert_weights_norm", True),
    }


# llama.cpp's architecture → transformers' model_type and what its config needs beyond the common values.
_ARCHITECTURES: dict[str, tuple[str, Callable[[Metadata], dict[str, Any]]]] = {
    "llama": ("mixtral", _mixtral),
    "qwen3moe": ("qwen3_moe", _qwen3_moe),
    "qwen3next": ("qwen3_next", _qwen_hybrid),
    "qwen35moe": ("qwen3_5_moe_text", _qwen_hybrid),
    "deepseek2": ("deepseek_v3", _deepseek),
    "gpt-oss": ("gpt_oss", _gpt_oss),
    "glm4moe": ("glm4_moe", _glm4_moe),
}
