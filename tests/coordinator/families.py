"""Tiny random checkpoints of the families: how each config is made small. Plain module, importable by path.

    make_checkpoint("mixtral", folder)     # f32, a few hundred kilobytes, always the same weights

`OVERRIDES` has what a family needs beyond `COMMON`; configs ignore what they do not know.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

VOCABULARY = 128

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}

# Multi-head latent attention: low ranks for queries and keys, a rotary part of its own.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
# An indexer picks the keys that each query sees.
INDEXED: dict[str, Any] = LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
SPARSE_FROM_SECOND = ["dense", "sparse", "sparse"]
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 24,
}
KIMI: dict[str, Any] = LATENT | {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": SPARSE_FROM_SECOND,
    "num_experts_per_token": 2,
    "num_expert_group": 1,
    "num_shared_experts": 1,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "model_max_length": 1024,
}
MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "n_layers": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "image_size": 8,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "adapter_in_dim": 16,
    "adapter_out_dim": 32,
    "projection_hidden_dim": 16,
    "projection_intermediate_size": 16,
    "projection_dim": 16,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "deepstack_visual_indexes": [0],
    "spatial_merge_size": 1,
    "layer_types": ["full_attention"],
    "mlp_layer_types": ["dense"],
}

AUDIO: dict[str, Any] = {
    "text_hidden_size": 32,
    "patch_sizes": [16],
    "hidden_sizes": [16],
    "depths": [1],
    "num_hidden_layers": 1,
    "out_hidden_size": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "downsample_hidden_size": 16,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria": {},
    "aria_text": {},
    "axk1": LATENT | {"mlp_layer_types": SPARSE_FROM_SECOND},
    "axk2": INDEXED | {"mlp_layer_types": SPARSE_FROM_SECOND, "layer_types": None},
    "bailing_hybrid": KIMI,
    "beam": {"mlp_layer_types": SPARSE_FROM_SECOND, "sliding_window": 6},
    "cohere2_moe": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": INDEXED | {"mlp_layer_types": SPARSE_FROM_SECOND},
    "deepseek_v4": {},
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1},
    "dots3_note_text": INDEXED | {"mlp_layer_types": SPARSE_FROM_SECOND, "per_layer_config": None},
    "ernie4_5_moe": {},
    "ernie4_5_vl_moe": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
                        "moe_intermediate_size": [24, 16], "mlp_layer_types": SPARSE_FROM_SECOND},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": VOCABULARY, "sliding_window": 6,
                    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm4v_moe": {"rope_parameters": ROPE | {"mrope_section": [1, 2, 1],
                                      "partial_rotary_factor": 1.0}},
    "glm5_next": INDEXED | {"head_dim": None, "qk_rope_head_dim": 0, "mlp_layer_types": SPARSE_FROM_SECOND,
                            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
                            "linear_head_dim": 8, "linear_num_heads": 4, "index_kpool": 2},
    "glm_moe_dsa": INDEXED | {"mlp_layer_types": SPARSE_FROM_SECOND},
    "gpt_oss": {"sliding_window": 6},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": MAMBA | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8,
                                 "shared_intermediate_size": 24,
                                 "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "hy_v4_vl": {},
    "inkling_text": {},
    "jamba": MAMBA | {"mamba_dt_rank": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_k25": LATENT,
    "kimi_linear": KIMI,
    "kolibri1": {},
    "laguna": {},
    "lara_mini": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {"block_size": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "minimax_m2": {},
    "minimax_m3_vl": {},
    "minimax_m3_vl_text": {},
    "mistral4": LATENT | {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1,
                                            "original_max_position_embeddings": 64}},
    "mistral_large4": INDEXED,
    "mixtral": {"sliding_window": None},
    "muse_spark": {"moe_hidden_size": 16, "sliding_window": 6},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "ssm_state_size": 8,
                   "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8, "moe_latent_size": 16,
                   "moe_shared_expert_intermediate_size": 24},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "qwen3_5_moe": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_moe": {},
    "qwen3_next": LINEAR,
    "qwen3_vl_moe": {},
    "qwen4_exp_text": LINEAR | {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
                                "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
                                "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
                                "ple_embed_dim": 16, "ngram_vocab_size_base": 64,
                                "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1},
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip

FAMILIES = sorted(OVERRIDES)


def make_config(family: str, **changes: Any) -> Any:
    """A small config of `family`; `changes` to its text part come last."""
    config_class = CONFIG_MAPPING[family]
    values = {name: value for name, value in (COMMON | OVERRIDES[family]).items() if value is not None} | changes
    if "text_config" not in config_class.sub_configs:
        return config_class(**values)
    parts: dict[str, Any] = {"text_config": values}
    for name in ("vision_config", "audio_config"):
        if name in config_class.sub_configs:
            part = config_class.sub_configs[name]
            model_type = getattr(part, "model_type", None)
            parts[name] = (VISION if name == "vision_config" else AUDIO) | (
                {"model_type": model_type} if model_type else {}
            )
    return config_class(**parts, dtype="float32")


def make_checkpoint(family: str, folder: Path, **changes: Any) -> None:
    """Writes a random f32 checkpoint of `family` to `folder` with `save_pretrained`; the same weights each time."""
    torch.manual_seed(20)
    config = make_config(family, **changes)
    auto = (
        AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    )
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than a fresh initialization, so that routers and logits differ
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
