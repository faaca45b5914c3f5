"""The shapes of known models, as their GGUF files have them: every tensor's name, size and role, and the metadata.

Names and keys are llama.cpp's; the sizes are those of the models' published configs. Two uses: `moehive estimate`
knows these models without a network, and benchmarks make files of random weights of the shapes in GEOMETRIES, with a
small vocabulary of their own, so that what is compared is the layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

VOCABULARY = 4096  # of files with random weights
CONTEXT = 8192  # tokens, of the same


class TensorShape(NamedTuple):
    """One tensor of a file; `shape` is [.., out, in]. Of floats: filled with `mean`, and `spread` around it."""

    name: str
    shape: tuple[int, ...]
    matrix: bool = False  # in the file's format; else f32
    mean: float = 0.0
    spread: float = 0.0  # standard deviation


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One architecture with its sizes. `tensors(layer, experts)` are those of a layer."""

    arch: str  # llama.cpp's name
    layers: int
    hidden: int
    experts: int
    top_k: int
    intermediate: int  # of one expert
    vocabulary: int  # of the real model
    keys: dict[str, Any]  # metadata under the architecture's name
    tensors: "Callable[[ModelShape, int, int], Iterator[TensorShape]]"
    tied: bool = False  # the table of tokens is the head too


def _matrix(name: str, *shape: int) -> TensorShape:
    return TensorShape(f"{name}.weight", shape, matrix=True)


def _norm(name: str, size: int) -> TensorShape:
    return TensorShape(f"{name}.weight", (size,), mean=1.0)


def _moe(model: ModelShape, blk: str, experts: int) -> Iterator[TensorShape]:
    hidden, inner = model.hidden, model.intermediate
    yield TensorShape(f"{blk}ffn_gate_inp.weight", (experts, hidden), spread=hidden**-0.5)
    yield _matrix(f"{blk}ffn_gate_exps", experts, inner, hidden)
    yield _matrix(f"{blk}ffn_up_exps", experts, inner, hidden)
    yield _matrix(f"{blk}ffn_down_exps", experts, hidden, inner)


def _mlp(model: ModelShape, blk: str, kind: str, inner: int) -> Iterator[TensorShape]:
    yield _matrix(f"{blk}ffn_gate{kind}", inner, model.hidden)
    yield _matrix(f"{blk}ffn_up{kind}", inner, model.hidden)
    yield _matrix(f"{blk}ffn_down{kind}", model.hidden, inner)


def _attention(model: ModelShape, blk: str, gated: bool) -> Iterator[TensorShape]:
    keys = model.keys
    heads, groups = keys["attention.head_count"], keys["attention.head_count_kv"]
    size = keys["attention.key_length"]
    yield _matrix(f"{blk}attn_q", heads * size * (2 if gated else 1), model.hidden)
    yield _matrix(f"{blk}attn_k", groups * size, model.hidden)
    yield _matrix(f"{blk}attn_v", groups * size, model.hidden)
    yield _matrix(f"{blk}attn_output", model.hidden, heads * size)
    yield _norm(f"{blk}attn_q_norm", size)
    yield _norm(f"{blk}attn_k_norm", size)


def _qwen3(model: ModelShape, layer: int, experts: int) -> Iterator[TensorShape]:
    blk = f"blk.{layer}."
    yield _norm(f"{blk}attn_norm", model.hidden)
    yield from _attention(model, blk, gated=False)
    yield _norm(f"{blk}ffn_norm", model.hidden)
    yield from _moe(model, blk, experts)


def _qwen35(model: ModelShape, layer: int, experts: int) -> Iterator[TensorShape]:
    blk, keys, hidden = f"blk.{layer}.", model.keys, model.hidden
    yield _norm(f"{blk}attn_norm", hidden)
    if (layer + 1) % keys["full_attention_interval"] == 0:
        yield from _attention(model, blk, gated=True)
    else:
        heads, size, values = keys["ssm.time_step_rank"], keys["ssm.state_size"], keys["ssm.inner_size"]
        mixed = 2 * keys["ssm.group_count"] * size + values
        yield _matrix(f"{blk}attn_qkv", mixed, hidden)
        yield _matrix(f"{blk}attn_gate", values, hidden)
        yield TensorShape(f"{blk}ssm_conv1d.weight", (mixed, keys["ssm.conv_kernel"]), spread=0.3)
        yield TensorShape(f"{blk}ssm_dt.bias", (heads,), mean=1.0)
        yield TensorShape(f"{blk}ssm_a", (heads,), mean=-1.0)
        yield _matrix(f"{blk}ssm_beta", heads, hidden)
        yield _matrix(f"{blk}ssm_alpha", heads, hidden)
        yield _norm(f"{blk}ssm_norm", size)
        yield _matrix(f"{blk}ssm_out", hidden, values)
    yield _norm(f"{blk}post_attention_norm", hidden)
    yield from _moe(model, blk, experts)
    yield TensorShape(f"{blk}ffn_gate_inp_shexp.weight", (hidden,), spread=hidden**-0.5)
    yield from _mlp(model, blk, "_shexp", keys["expert_shared_feed_forward_length"])


def _deepseek(model: ModelShape, layer: int, experts: int) -> Iterator[TensorShape]:
    blk, keys, hidden = f"blk.{layer}.", model.keys, model.hidden
    heads, queries, latent = (
        keys["attention.head_count"],
        keys["attention.q_lora_rank"],
        keys["attention.kv_lora_rank"],
    )
    key, value, rope = (
        keys["attention.key_length_mla"],
        keys["attention.value_length_mla"],
        keys["rope.dimension_count"],
    )
    yield _norm(f"{blk}attn_norm", hidden)
    yield _matrix(f"{blk}attn_q_a", queries, hidden)
    yield _norm(f"{blk}attn_q_a_norm", queries)
    yield _matrix(f"{blk}attn_q_b", heads * key, queries)
    yield _matrix(f"{blk}attn_kv_a_mqa", latent + rope, hidden)
    yield _norm(f"{blk}attn_kv_a_norm", latent)
    yield _matrix(f"{blk}attn_k_b", heads, latent, key - rope)
    yield _matrix(f"{blk}attn_v_b", heads, value, latent)
    yield _matrix(f"{blk}attn_output", hidden, heads * value)
    yield _norm(f"{blk}ffn_norm", hidden)
    if layer < keys["leading_dense_block_count"]:
        yield from _mlp(model, blk, "", keys["feed_forward_length"])
        return
    yield from _moe(model, blk, experts)
    yield TensorShape(f"{blk}exp_probs_b.bias", (experts,))
    yield from _mlp(model, blk, "_shexp", keys["expert_shared_count"] * model.intermediate)


def _glm4(model: ModelShape, layer: int, experts: int) -> Iterator[TensorShape]:
    blk, keys = f"blk.{layer}.", model.keys
    yield _norm(f"{blk}attn_norm", model.hidden)
    yield from _attention(model, blk, gated=False)
    yield _norm(f"{blk}post_attention_norm", model.hidden)
    if layer < keys["leading_dense_block_count"]:
        yield from _mlp(model, blk, "", keys["feed_forward_length"])
        return
    yield from _moe(model, blk, experts)
    yield TensorShape(f"{blk}exp_probs_b.bias", (experts,))
    yield from _mlp(model, blk, "_shexp", keys["expert_shared_count"] * model.intermediate)


def _qwen35_keys(heads: int, value_heads: int, shared: int) -> dict[str, Any]:
    return {
        "attention.head_count": heads, "attention.head_count_kv": 2,
        "attention.key_length": 256, "attention.value_length": 256,
        "rope.freq_base": 1e7, "rope.dimension_count": 64, "rope.dimension_sections": [11, 11, 10, 0],
        "expert_shared_feed_forward_length": shared, "full_attention_interval": 4,
        "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16,
        "ssm.time_step_rank": value_heads, "ssm.inner_size": 128 * value_heads,
    }  # fmt: skip


_QWEN3_KEYS = {
    "attention.head_count": 32, "attention.head_count_kv": 4,
    "attention.key_length": 128, "attention.value_length": 128, "rope.freq_base": 1e6,
}  # fmt: skip
_KIMI_KEYS = {
    "attention.head_count": 64, "attention.head_count_kv": 1, "feed_forward_length": 18432,
    "attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512,
    "attention.key_length": 576, "attention.value_length": 512,
    "attention.key_length_mla": 192, "attention.value_length_mla": 128,
    "rope.dimension_count": 64, "rope.freq_base": 5e4, "leading_dense_block_count": 1,
    "expert_shared_count": 1, "expert_weights_scale": 2.827, "expert_weights_norm": True,
    "expert_gating_func": 2,  # sigmoid
}  # fmt: skip

_DEEPSEEK_KEYS = _KIMI_KEYS | {
    "attention.head_count": 128, "leading_dense_block_count": 3, "rope.freq_base": 1e4, "expert_weights_scale": 2.5,
    "expert_group_count": 8, "expert_group_used_count": 4,
}  # fmt: skip


def _heads(heads: int, groups: int, size: int, **others: int) -> dict[str, Any]:
    return {"attention.head_count": heads, "attention.head_count_kv": groups, "attention.key_length": size, **others}


# What benchmarks can write as files.
GEOMETRIES = {
    "qwen3.5-35b": ModelShape("qwen35moe", 40, 2048, 256, 8, 512, 248_320, _qwen35_keys(16, 32, 512), _qwen35),
    "qwen3.5-397b": ModelShape("qwen35moe", 60, 4096, 512, 10, 1024, 248_320, _qwen35_keys(32, 64, 1024), _qwen35),
    "qwen3-30b": ModelShape("qwen3moe", 48, 2048, 128, 8, 768, 151_936, _QWEN3_KEYS, _qwen3),
    "kimi-k2": ModelShape("deepseek2", 61, 7168, 384, 8, 2048, 163_840, _KIMI_KEYS, _deepseek),
}
_GLM = {"leading_dense_block_count": 3, "feed_forward_length": 12_288, "expert_shared_count": 1}
_AIR = {"leading_dense_block_count": 1, "feed_forward_length": 10_944, "expert_shared_count": 1}
MODELS = GEOMETRIES | {
    "qwen3-235b": ModelShape("qwen3moe", 94, 4096, 128, 8, 1536, 151_936, _heads(64, 4, 128), _qwen3),
    "qwen3-next-80b": ModelShape("qwen3next", 48, 2048, 512, 10, 512, 151_936, _qwen35_keys(16, 32, 512), _qwen35),
    "deepseek-v3": ModelShape("deepseek2", 61, 7168, 256, 8, 2048, 129_280, _DEEPSEEK_KEYS, _deepseek),
    "glm-4.5": ModelShape("glm4moe", 92, 5120, 160, 8, 1536, 151_552, _heads(96, 8, 128, **_GLM), _glm4),
    "glm-4.5-air": ModelShape("glm4moe", 46, 4096, 128, 8, 1408, 151_552, _heads(96, 8, 128, **_AIR), _glm4),
    "gpt-oss-20b": ModelShape("gpt-oss", 24, 2880, 32, 4, 2880, 201_088, _heads(64, 8, 64), _qwen3),
    "gpt-oss-120b": ModelShape("gpt-oss", 36, 2880, 128, 4, 2880, 201_088, _heads(64, 8, 64), _qwen3),
    "mixtral-8x7b": ModelShape("llama", 32, 4096, 8, 2, 14_336, 32_000, _heads(32, 8, 128), _qwen3),
    "mixtral-8x22b": ModelShape("llama", 56, 6144, 8, 2, 16_384, 32_768, _heads(48, 8, 128), _qwen3),
}
# What a hub id's name begins with, in lower case, the organization left out; the longest that fits counts.
HUB_NAMES = {
    "qwen3.5-35b-a3b": "qwen3.5-35b", "qwen3.5-397b-a17b": "qwen3.5-397b", "qwen3-30b-a3b": "qwen3-30b",
    "qwen3-coder-30b-a3b": "qwen3-30b", "qwen3-235b-a22b": "qwen3-235b", "qwen3-next-80b-a3b": "qwen3-next-80b",
    "kimi-k2": "kimi-k2", "deepseek-v3": "deepseek-v3", "deepseek-r1": "deepseek-v3", "glm-4.5": "glm-4.5",
    "glm-4.6": "glm-4.5", "glm-4.5-air": "glm-4.5-air", "gpt-oss-20b": "gpt-oss-20b", "gpt-oss-120b": "gpt-oss-120b",
    "mixtral-8x7b": "mixtral-8x7b", "mixtral-8x22b": "mixtral-8x22b",
}  # fmt: skip
# Names that begin like one above and are other models.
OTHERS = ("deepseek-v3.2", "deepseek-r1-distill", "kimi-k2.5", "glm-4.5v", "glm-4.6v")


def find_shape(model: str) -> tuple[str, ModelShape] | None:
    """The shape of a model by its name here or its hub id (`organization/name`), with its name here."""
    name = model.rpartition("/")[2].lower()
    if name in MODELS:
        return name, MODELS[name]
    if name.startswith(OTHERS):
        return None
    fitting = [known for known in HUB_NAMES if name == known or name.startswith((f"{known}-", f"{known}."))]
    if not fitting:
        return None
    found = HUB_NAMES[max(fitting, key=len)]
    return found, MODELS[found]
