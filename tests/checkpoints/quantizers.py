"""Writes quantized checkpoints with the code of the projects whose formats they are. Plain module.

    write(METHODS["fp8"], wide, folder)   # quantizes the bf16 checkpoint `wide`, returns what the new one means

transformers quantizes and dequantizes FP8, compressed-tensors its own formats. GPTQ and AWQ have no quantizer that
runs everywhere: their words are packed here as published, from codes and scales of compressed-tensors.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

Tensors = dict[str, torch.Tensor]
# The module's name and its weight → what is stored for it (by its last name), and the f32 numbers that this means.
Quantize = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]

WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 64,
    "num_hidden_layers": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 4,  # all of them: rounding then moves no token to another expert
    "shared_expert_intermediate_size": 128, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "layer_types": None, "tie_word_embeddings": False, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip


def make_wide(families: ModuleType, family: str, folder: Path) -> None:
    """A random bf16 checkpoint with rows of whole blocks."""
    values = WIDE | {"layer_types": ["linear_attention", "full_attention"]} if "qwen3_5" in family else dict(WIDE)
    if family == "gpt_oss":
        values["layer_types"] = ["sliding_attention", "full_attention"]
        values["intermediate_size"] = 128
    if family == "deepseek_v3":
        values["head_dim"] = values["qk_rope_head_dim"]
    values = {name: value for name, value in values.items() if value is not None}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(families.make_config(family, **values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
            elif "norm" not in name:
                parameter.normal_(0, 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)


def fp8(*block: int) -> Quantize:
    """transformers' FineGrainedFP8: a scale for so many rows and columns."""
    quantizer = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=block))

    def run(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        stored = Fp8Quantize(quantizer).convert({"x.weight": weight})
        if "x.weight_scale_inv" not in stored:  # sizes that are no multiples of a block's stay as they are
            return {"weight": weight}, weight.float()
        codes, scales = stored["x.weight"], stored["x.weight_scale_inv"]
        means = Fp8Dequantize(quantizer)._dequantize_one(codes, scales, torch.float32)
        return {"weight": codes, "weight_scale_inv": scales}, means

    return run


def compressed(kind: str, **arguments: Any) -> Quantize:
    """compressed-tensors' compressor `kind` with QuantizationArgs."""
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(kind)

    def run(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale, zero = _parameters(weight, args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = compressor.compress(state, scheme)
        wide = dict(stored)
        if wide["weight_scale"].dtype.is_floating_point:
            wide["weight_scale"] = wide["weight_scale"].float()  # else it multiplies in bf16, and rounds
        means = compressor.decompress(wide, scheme)["weight"]
        return {name: tensor.contiguous() for name, tensor in stored.items()}, means.float()

    return run


def by_activation(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' `actorder: group`, which it wrote before 0.20: groups are of columns that lie apart."""
    of_column = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0)) // 32
    order = torch.argsort(of_column)
    back = torch.argsort(order)
    run = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False)
    stored, means = run(weight[:, order].contiguous())
    codes = unpack_from_int32(stored["weight_packed"], 4, weight.shape)[:, back].contiguous()
    return stored | {"weight_packed": pack_to_int32(codes, 4), "weight_g_idx": of_column.int()}, means[:, back]


def _parameters(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points from the least and the largest number of each row, group, block, or of all."""
    rows, columns = weight.shape
    if args.strategy == "block":
        blocks = weight.view(rows // 128, 128, columns // 128, 128).transpose(1, 2).flatten(2)
    elif args.strategy == "tensor":
        blocks = weight.view(1, -1)
    else:
        blocks = weight.view(rows, -1, args.group_size or columns)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    return (scale if args.scale_dtype else scale.to(torch.bfloat16)), zero


def _codes(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0 to 15 [out, in], f16 scales and zero points 0 to 15 [out, groups], and the numbers that they mean."""
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group, symmetric=False)
    scale, zero = _parameters(weight.float(), args)
    scale = scale.half().float()
    codes = quantize(x=weight.float(), scale=scale, zero_point=zero, args=args, dtype=torch.int8)
    means = dequantize(x_q=codes, scale=scale, zero_point=zero, args=args)
    return codes.int() + 8, scale.half(), zero.int() + 8, means.float()


def _words(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """int32 [n, columns / 8]; place j of a word, lowest bits first, holds column 8 i + order[j]."""
    eights = codes.view(len(codes), -1, 8)[:, :, list(order)].long()
    words = (eights << torch.arange(0, 32, 4)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def gptq(version: int, group: int = 64) -> Quantize:
    """GPTQ's layout: words along the input; version 1 stores words of zero points less 1 each, as GPTQModel does."""

    def run(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, scale, zero, means = _codes(weight, group)
        straight = tuple(range(8))
        return {
            "qweight": _words(codes, straight).T.contiguous(),
            "qzeros": _words(zero.T.contiguous(), straight) - (0x11111111 if version == 1 else 0),
            "scales": scale.T.contiguous(),
            "g_idx": (torch.arange(weight.shape[1]) // group).int(),
        }, means

    return run


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """AutoAWQ's gemm layout: words along the output, in its own order."""
    codes, scale, zero, means = _codes(weight, 128)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": _words(codes.T.contiguous(), order),
        "qzeros": _words(zero.T.contiguous(), order),
        "scales": scale.T.contiguous(),
    }, means


def _fp8_of(*block: int) -> dict[str, Any]:
    return FineGrainedFP8Config(weight_block_size=block).to_dict() | {"quant_method": "fp8"}


def _of(kind: str, **weights: Any) -> dict[str, Any]:
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}} if weights else {}
    return {"quant_method": "compressed-tensors", "format": kind, **groups}


# name → the config's section, how a matrix is quantized, the format in which it is computed (None: expanded)
METHODS: dict[str, tuple[dict[str, Any], Quantize, str | None]] = {
    "fp8": (_fp8_of(128, 128), fp8(128, 128), "fp8_block"),
    "fp8, blocks of 64 x 32": (_fp8_of(64, 32), fp8(64, 32), None),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}, gptq(1), "int4_g64"),
    "gptq v2": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, gptq(2, 32), "int4_g32"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, awq, "int4_g128"),
    "int4, groups of 32": (
        _of("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
        "int4_g32",
    ),
    "int4, groups of 128, zero points": (
        _of("pack-quantized", num_bits=4, type="int", strategy="group", group_size=128, symmetric=False),
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=128, symmetric=False),
        "int4_g128",
    ),
    "int4, ordered by activation": (_of("pack-quantized", num_bits=4, group_size=32), by_activation, None),
    "int4, by row": (
        _of("pack-quantized", num_bits=4, type="int", strategy="channel", symmetric=True),
        compressed("pack-quantized", num_bits=4, type="int", strategy="channel", symmetric=True),
        "int4_g128",
    ),
    "int8 in words": (
        _of("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        "q8_0",
    ),
    "int8": (
        _of("int-quantized"),
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        "q8_0",
    ),
    "int8, zero points": (
        _of("int-quantized"),
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        None,
    ),
    "int8, groups of 32": (
        _of("int-quantized"),
        compressed("int-quantized", num_bits=8, type="int", strategy="group", group_size=32, symmetric=True),
        "q8_0",
    ),
    "int8, groups of 16": (
        _of("int-quantized"),
        compressed("int-quantized", num_bits=8, type="int", strategy="group", group_size=16, symmetric=True),
        None,
    ),
    "int8 in words, groups of 64, zero points": (
        _of("pack-quantized", num_bits=8, type="int", strategy="group", group_size=64, symmetric=False),
        compressed("pack-quantized", num_bits=8, type="int", strategy="group", group_size=64, symmetric=False),
        None,
    ),
    "fp8 by row": (
        _of("float-quantized"),
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
        None,
    ),
    "fp8 by tensor": (
        _of("float-quantized"),
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor", symmetric=True),
        "fp8_block",
    ),
    "fp8 by block": (
        _of("float-quantized"),
        compressed(
            "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128], symmetric=True
        ),
        "fp8_block",
    ),
    "mxfp4": (
        _of("mxfp4-pack-quantized"),
        compressed(
            "mxfp4-pack-quantized",
            num_bits=4,
            type="float",
            strategy="group",
            group_size=32,
            symmetric=True,
            scale_dtype=torch.uint8,
        ),
        "mxfp4",
    ),
}


def is_quantized(name: str) -> bool:
    """Which matrices quantizers take: projections, not routers, tables or heads."""
    return name.endswith("_proj.weight") or name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight"))


def write(method: tuple[dict[str, Any], Quantize, str | None], wide: Path, folder: Path) -> Tensors:
    """Quantizes `wide` into `folder`; returns what the new checkpoint means, f32, by the names of `wide`."""
    section, run, _ = method
    folder.mkdir()
    stored: Tensors = {}
    means: Tensors = {}
    for name, tensor in load_file(wide / "model.safetensors").items():
        if not is_quantized(name):
            stored[name], means[name] = tensor, tensor.float()
            continue
        parts, means[name] = run(tensor)
        stored |= {f"{name.removesuffix('weight')}{last}": part for last, part in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((wide / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}, default=str))
    return means


def reference(means: Tensors, wide: Path, folder: Path) -> Any:
    """transformers' own model, f32, of what a quantized checkpoint means."""
    folder.mkdir()
    shutil.copy(wide / "config.json", folder)
    save_file(means, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
