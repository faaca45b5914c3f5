"""Writes transformers' tiny checkpoints as llama.cpp's converter does. Plain module, importable by path.

What is done to each tensor is taken from llama.cpp's conversion/{llama,qwen,deepseek,gpt_oss,glm}.py; the files were
compared with those that the converter itself wrote for the same checkpoints.

    write(model, config, Path("x.gguf"), "F32")     # or F16, BF16, Q8_0, Q4_0: of matrices
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

ARCHITECTURES = {
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
}


Encode = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]]
Describe = Callable[[gguf.GGUFWriter], None]


def write(
    model: Any,
    config: Any,
    path: Path,
    kind: str = "F32",
    split: int = 0,
    encode: Encode | None = None,
    describe: Describe | None = None,
) -> None:
    """The model's weights and its config; `split`: at most so many tensors in a file.

    `encode` gives the bytes and the type of a matrix by its name in the file; else all are of `kind`. `describe` adds
    to the metadata.
    """
    family = config.model_type
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family], split_max_tensors=split)
    for key, value in _values(config).items():
        name = key if key.startswith("general.") else f"{ARCHITECTURES[family]}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    if describe is not None:
        describe(writer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, _arch(family)), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for hf, value in _converted(config, name, tensor.float()):
            stored = hf if hf.startswith("blk.") else names.get_name(hf, try_suffixes=(".weight", ".bias"))
            assert stored is not None, hf
            data = value.contiguous().numpy()
            if data.ndim > 1 and "conv1d" not in hf and not stored.endswith(".bias"):
                type_ = getattr(gguf.GGMLQuantizationType, kind)
                if encode is None:
                    raw = gguf.quantize(data, type_)
                else:
                    raw, type_ = encode(stored if stored.endswith(".weight") else f"{stored}.weight", data)
                writer.add_tensor(stored, raw, raw_dtype=type_)
            else:
                writer.add_tensor(stored, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _arch(family: str) -> str:
    return next(a.name for a, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])


def _values(c: Any) -> dict[str, Any]:
    rope = c.rope_parameters
    head = c.head_dim
    values: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": getattr(c, "intermediate_size", None) or 0,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "expert_used_count": c.num_experts_per_tok,
    }
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if hasattr(c, name):
            values["expert_count"] = getattr(c, name)
    if rope["rope_type"] == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        }
    if c.model_type != "mixtral":
        values["expert_feed_forward_length"] = (
            c.intermediate_size if c.model_type == "gpt_oss" else c.moe_intermediate_size
        )
    if c.model_type == "gpt_oss":
        values["attention.sliding_window"] = c.sliding_window
    if c.model_type in ("qwen3_next", "qwen3_5_moe_text"):
        values |= {
            "ssm.conv_kernel": c.linear_conv_kernel_dim,
            "ssm.state_size": c.linear_key_head_dim,
            "ssm.group_count": c.linear_num_key_heads,
            "ssm.time_step_rank": c.linear_num_value_heads,
            "ssm.inner_size": c.linear_value_head_dim * c.linear_num_value_heads,
            "attention.recurrent_layers": [kind == "linear_attention" for kind in c.layer_types],
            "expert_shared_feed_forward_length": c.shared_expert_intermediate_size,
        }
    if c.model_type in ("deepseek_v3", "glm4_moe"):
        values |= {
            "leading_dense_block_count": c.first_k_dense_replace,
            "expert_shared_count": c.n_shared_experts,
            "expert_weights_scale": c.routed_scaling_factor,
            "expert_weights_norm": c.norm_topk_prob,
            "expert_gating_func": 2,
            "expert_group_count": c.n_group,
            "expert_group_used_count": c.topk_group,
        }
    if c.model_type == "deepseek_v3":
        values |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": c.q_lora_rank,
            "attention.kv_lora_rank": c.kv_lora_rank,
            "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
            "attention.value_length": c.kv_lora_rank,
            "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
            "attention.value_length_mla": c.v_head_dim,
            "rope.dimension_count": c.qk_rope_head_dim,
        }
    return values


def _converted(c: Any, name: str, t: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """What the converter makes of one of transformers' parameters: names that gguf-py's table knows, and tensors."""
    base = name.rpartition(".")[0]
    if name.endswith("mlp.experts.gate_up_proj"):
        if c.model_type == "gpt_oss":
            t = t.transpose(1, 2)
            return [(f"{base}.gate_proj.weight", t[:, ::2]), (f"{base}.up_proj.weight", t[:, 1::2])]
        gate, up = t.chunk(2, 1)
        return [(f"{base}.gate_proj.weight", gate), (f"{base}.up_proj.weight", up)]
    if name.endswith("mlp.experts.gate_up_proj_bias"):
        return [(f"{base}.gate_proj.bias", t[:, ::2]), (f"{base}.up_proj.bias", t[:, 1::2])]
    if name.endswith("mlp.experts.down_proj"):
        return [(f"{name}.weight", t.transpose(1, 2) if c.model_type == "gpt_oss" else t)]
    if name.endswith("mlp.experts.down_proj_bias"):
        return [(f"{base}.down_proj.bias", t)]
    if name.endswith("sinks"):
        return [(f"{name}.weight", t)]
    if name.endswith("e_score_correction_bias"):
        return [(name.replace("_bias", ".bias"), t)]
    if name.endswith("kv_b_proj.weight"):
        kv = t.view(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, -1)
        k, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        return [(name.replace("kv_b", "k_b"), k.transpose(1, 2)), (name.replace("kv_b", "v_b"), v)]
    if c.model_type == "mixtral" and base.endswith(("q_proj", "k_proj")):
        heads = c.num_attention_heads if base.endswith("q_proj") else c.num_key_value_heads
        t = t.reshape(heads, 2, t.shape[0] // heads // 2, t.shape[1]).swapaxes(1, 2).reshape(t.shape)
    if c.model_type in ("qwen3_next", "qwen3_5_moe_text"):
        return _hybrid(c, name, t)
    return [(name, t)]


def _hybrid(c: Any, name: str, t: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    keys, values = c.linear_num_key_heads, c.linear_num_value_heads
    key, value = c.linear_key_head_dim, c.linear_value_head_dim

    def tiled(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
        shape = list(x.shape)
        apart = x.reshape(*shape[:dim], keys, values // keys, size, *shape[dim + 1 :])
        return apart.transpose(dim, dim + 1).reshape(shape)

    if c.model_type == "qwen3_5_moe_text":
        if ".in_proj_qkv." in name or ".conv1d." in name:
            t = t.squeeze(1) if ".conv1d." in name else t
            t = torch.cat([t[: 2 * keys * key], tiled(t[2 * keys * key :], 0, value)])
        elif ".in_proj_z." in name:
            t = tiled(t, 0, value)
        elif name.endswith((".in_proj_a.weight", ".in_proj_b.weight", ".A_log", ".dt_bias")):
            t = tiled(t, 0, 1)
        elif ".linear_attn.out_proj." in name:
            t = tiled(t, 1, value)
    if name.endswith(".A_log"):
        return [(name, -t.exp())]
    if name.endswith(".dt_bias"):
        return [(name.replace("dt_bias", "dt_proj.bias"), t)]
    if "conv1d" in name:
        return [(name, t.squeeze())]
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return [(name, t + 1)]
    if name.endswith("in_proj_qkvz.weight"):
        each = values // keys * value
        q, k, v, z = t.view(keys, 2 * key + 2 * each, -1).split([key, key, each, each], 1)
        qkv = torch.cat([part.flatten(0, 1) for part in (q, k, v)])
        block = f"blk.{name.split('.')[2]}"
        return [(f"{block}.attn_qkv.weight", qkv), (f"{block}.attn_gate.weight", z.flatten(0, 1))]

    return [(name, t)]
