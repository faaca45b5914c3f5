"""The dense model that the demo starts from, out of its GGUF file: SmolLM2-135M-Instruct, a Llama.

transformers' own reader and dequantization are used directly: its `from_pretrained(gguf_file=...)` gives the same
tensors but reads the vocabulary several times, which takes longer than all the rest.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tokenizer(path: Path) -> Any:
    """The tokenizer and chat template of the GGUF file, as transformers writes and reads them."""
    architecture, description, config = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(architecture, description)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **config)


def config(path: Path) -> LlamaConfig:
    """The dense model's configuration."""
    meta, _ = read_gguf_metadata(str(path))
    return LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.rope.dimension_count"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )


def dense_model(path: Path) -> LlamaForCausalLM:
    """The dense model in f32, for inference: what the demo model must agree with."""
    shape = config(path)
    header = GgufHeader.from_file(str(path))
    tensors = load_gguf_state_dict(header)
    state: dict[str, torch.Tensor] = {}
    for info in header.tensors:
        value = tensors[info.name][...]
        if info.ggml_type in GGML_BLOCK:
            value = dequantize(value, info.ggml_type)
        state[_hub_name(info.name)] = _hub_order(info.name, value.reshape(info.shape).float(), shape)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Computed from the configuration at construction, so not in the file: the one thing left on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(shape)
    model.requires_grad_(False)
    model.eval()
    return model


def _hub_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.weight"


def _hub_order(name: str, value: torch.Tensor, shape: LlamaConfig) -> torch.Tensor:
    """Undoes llama.cpp's order of the rows of q and k: it rotates neighbours, transformers rotates halves."""
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return value
    return value.view(heads, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
