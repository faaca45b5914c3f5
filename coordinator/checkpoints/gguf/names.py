"""transformers' parameter names → the tensors of a GGUF, and the order in which llama.cpp's converter left rows.

The names are those of gguf-py's constants.py and tensor_mapping.py. The converter moves rows and columns for three
architectures (conversion/llama.py: `permute`; conversion/qwen.py: `in_proj_qkvz` and `_reorder_v_heads`); the
functions below give, for each of transformers' rows, the GGUF's row. Rows move as whole bytes, so nothing is rounded.
"""

import re
from typing import Any

import torch

_MODEL = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_qkvz": "ssm_in",  # of older files; newer ones hold attn_qkv and attn_gate
}
_WHOLE = {  # names that have no `.weight` on one side
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
}
# The families whose second norm is named after attention; the others' is named as the one before the MLP.
_POST_NORM = ("qwen3_next", "qwen3_5_moe_text", "gpt_oss", "glm4_moe")
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(family: str, name: str) -> str | None:
    """The GGUF's name of transformers' parameter `name`; None for a name that is not in the table."""
    if name == "lm_head.weight":
        return "output.weight"
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return _MODEL.get(name.removeprefix("model."))
    block, rest = f"blk.{int(match[1])}", match[2]
    if rest in _WHOLE:
        return f"{block}.{_WHOLE[rest]}"
    module, _, kind = rest.rpartition(".")
    if module == "post_attention_layernorm":
        return f"{block}.{'post_attention_norm' if family in _POST_NORM else 'ffn_norm'}.{kind}"
    return f"{block}.{_LAYER[module]}.{kind}" if module in _LAYER and kind in ("weight", "bias") else None


def row_order(config: Any, name: str) -> torch.Tensor | None:
    """For each of transformers' rows of `name`, the row of the GGUF's tensor; None where they are the same."""
    if config.model_type == "mixtral":
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if part in heads:
            return _rotary_pairs(heads[part], config.head_dim or config.hidden_size // config.num_attention_heads)
    if config.model_type == "qwen3_next" and name.endswith("in_proj_qkvz.weight"):
        return _by_key_head(config)
    if not _tiled(config) or ".linear_attn." not in name:
        return None
    values, keys = _value_heads(config, config.linear_value_head_dim), _key_rows(config)
    if name.endswith((".in_proj_a.weight", ".in_proj_b.weight", ".A_log", ".dt_bias")):
        return _value_heads(config, 1)
    if name.endswith(".in_proj_z.weight"):
        return values
    if name.endswith((".in_proj_qkv.weight", ".conv1d.weight")):
        return torch.cat([torch.arange(keys), keys + values])
    return None


def column_order(config: Any, name: str) -> torch.Tensor | None:
    """As `row_order`, of the columns."""
    if _tiled(config) and name.endswith(".linear_attn.out_proj.weight"):
        return _value_heads(config, config.linear_value_head_dim)
    return None


def _rotary_pairs(heads: int, size: int) -> torch.Tensor:
    """llama.cpp turns neighbours, transformers the two halves of a head."""
    theirs = torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)
    return theirs.argsort()


def _tiled(config: Any) -> bool:
    """Whether value heads lie in another order: llama.cpp's first ones of all key heads come first."""
    return config.model_type == "qwen3_5_moe_text" and bool(
        config.linear_num_key_heads != config.linear_num_value_heads
    )


def _value_heads(config: Any, size: int) -> torch.Tensor:
    keys = config.linear_num_key_heads
    each = config.linear_num_value_heads // keys
    return torch.arange(keys * each * size).view(each, keys, size).transpose(0, 1).reshape(-1)


def _key_rows(config: Any) -> int:
    return int(2 * config.linear_num_key_heads * config.linear_key_head_dim)


def _by_key_head(config: Any) -> torch.Tensor:
    """Of attn_qkv above attn_gate (all q, all k, all v, all z) → for each key head its q, k, v and z."""
    keys, size = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // keys * config.linear_value_head_dim
    parts = [size, size, values, values]
    starts = [0, keys * size, 2 * keys * size, 2 * keys * size + keys * values]
    return torch.cat(
        [
            torch.arange(start + head * part, start + (head + 1) * part)
            for head in range(keys)
            for start, part in zip(starts, parts, strict=True)
        ]
    )
