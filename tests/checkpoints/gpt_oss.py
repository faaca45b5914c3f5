"""gpt-oss as its publisher's repository holds it: three copies of one model. Plain module.

    publish(wide, folder)    # `wide`: a random bf16 checkpoint of transformers' own

At the top, safetensors with transformers' names (shards numbered from 0); in original/, the publisher's own names
(openai/gpt-oss, gpt_oss/torch/model.py and weights.py); in metal/, one file for Apple's GPUs, here a few bytes.
Experts are MXFP4: blocks of 16 bytes and a scale for each 32 columns, rows of gate and up in turn. compressed-tensors
rounds to it; transformers itself does so only with kernels for a GPU.
"""

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
BESIDE = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHARDS = 3
_OWN_NAMES = {
    "model.embed_tokens.": "embedding.", "lm_head.": "unembedding.", "model.norm.weight": "norm.scale",
    "model.layers.": "block.", "self_attn.o_proj.": "attn.out.", "self_attn.": "attn.",
    "input_layernorm.weight": "attn.norm.scale", "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.": "mlp.gate.", "experts.gate_up_proj_bias": "mlp1_bias", "experts.down_proj_bias": "mlp2_bias",
    "experts.gate_up_proj_": "mlp1_weight.", "experts.down_proj_": "mlp2_weight.",
}  # fmt: skip


def publish(wide: Path, folder: Path) -> None:
    """Writes the repository's files, with config.json in the keys that it was published with."""
    tensors = _quantized(load_file(wide / "model.safetensors"))
    for part in (folder, folder / "original", folder / "metal"):
        part.mkdir()
    weight_map = {}
    for number in range(SHARDS):
        file = f"model-{number:05d}-of-{SHARDS - 1:05d}.safetensors"
        held = {name: tensors[name] for name in sorted(tensors)[number::SHARDS]}
        save_file(held, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((wide / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(_published(config)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "do_sample": True}))
    save_file(_own(tensors), folder / "original" / "model.safetensors")
    dtypes = {name: "FP4" if name.endswith(".blocks") else "BF16" for name in _own(tensors)}
    (folder / "original" / "dtypes.json").write_text(json.dumps(dtypes))
    (folder / "original" / "config.json").write_text(json.dumps({"num_experts": 4, "rope_scaling_factor": 32.0}))
    (folder / "metal" / "model.bin").write_bytes(b"GPT-OSS v1.0")


def _quantized(tensors: Tensors) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            found[name] = tensor
            continue
        experts = [_mxfp4(expert.T.contiguous()) for expert in tensor]  # transformers has [in, out]
        found[f"{name}_blocks"] = torch.stack([codes for codes, _ in experts])
        found[f"{name}_scales"] = torch.stack([scales for _, scales in experts])
    return found


def _mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [out, in] as blocks, uint8 [out, in / 32, 16], and scales, uint8 [out, in / 32]."""
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8
    )
    groups = weight.view(len(weight), -1, 32)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    stored = compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    return stored["weight_packed"].view(*groups.shape[:2], 16).contiguous(), stored["weight_scale"].contiguous()


def _published(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.pop("rope_parameters"))
    theta = rope.pop("rope_theta")
    config.pop("dtype", None)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return config | {
        "experts_per_token": config["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "quantization_config": {"modules_to_not_convert": skipped, "quant_method": "mxfp4"},
        "rope_scaling": rope,
        "rope_theta": theta,
        "swiglu_limit": 7.0,
        "transformers_version": "4.55.0.dev0",
    }


def _own(tensors: Tensors) -> Tensors:
    """Under the publisher's own names, with queries, keys and values in one matrix."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        own = name
        for theirs, ours in _OWN_NAMES.items():
            own = own.replace(theirs, ours)
        if ".q_proj." in own:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[own.replace("q_proj", "qkv")] = torch.cat(parts)
        elif ".k_proj." not in own and ".v_proj." not in own:
            found[own] = tensor
    return found
