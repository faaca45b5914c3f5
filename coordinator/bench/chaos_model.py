"""The model of `moehive bench chaos`: small enough that faults and not arithmetic take the time."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

VOCABULARY, HIDDEN, LAYERS, EXPERTS, MIDDLE = 128, 64, 4, 16, 48
HEADS, KV_HEADS, HEAD = 4, 2, 16


def tiny_model(folder: Path) -> Path:
    """Writes a Qwen3-MoE checkpoint of random weights, always the same, to the new `folder`, and returns it.

    The weights are as large as trained ones: every expert that is left out changes the text.
    """
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)

    def ones(size: int) -> npt.NDArray[np.float32]:
        return np.ones(size, np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": ones(HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        parts = {
            "input_layernorm": ones(HIDDEN),
            "post_attention_layernorm": ones(HIDDEN),
            "self_attn.q_proj": matrix(HEADS * HEAD, HIDDEN),
            "self_attn.k_proj": matrix(KV_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj": matrix(KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj": matrix(HIDDEN, HEADS * HEAD),
            "self_attn.q_norm": ones(HEAD),
            "self_attn.k_norm": ones(HEAD),
            "mlp.gate": matrix(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            parts[f"mlp.experts.{expert}.gate_proj"] = matrix(MIDDLE, HIDDEN)
            parts[f"mlp.experts.{expert}.up_proj"] = matrix(MIDDLE, HIDDEN)
            parts[f"mlp.experts.{expert}.down_proj"] = matrix(HIDDEN, MIDDLE)
        tensors |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in parts.items()}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "float32",
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "moe_intermediate_size": MIDDLE,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD, "num_experts": EXPERTS, "num_experts_per_tok": 4, "norm_topk_prob": True,
        "max_position_embeddings": 1024, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
