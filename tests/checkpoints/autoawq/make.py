#!/usr/bin/env python3
"""Makes the archive beside it: a small random model that AutoAWQ quantized, in its layouts gemm and gemv.

    python tests/checkpoints/autoawq/make.py    # in an environment of its own: autoawq 0.2.9, transformers 4.51.3

`autoawq.tar.xz` holds a directory for each of `LAYOUTS`, as AutoAWQ saved it, and `logits.safetensors` with what
transformers says to `TOKENS` when AutoAWQ's dequantize_gemm has expanded the weights. It expands gemm alone; the same
numbers in gemm say what those in gemv mean.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fixtures import TOKENS, save_random, text, write_archive  # noqa: E402 - beside this script's folder

LAYOUTS = {"gemm": ("GEMM", 128), "gemm_32": ("GEMM", 32), "gemv": ("GEMV", 64)}


def quantize(source: Path, folder: Path, layout: str, group: int) -> None:
    """AutoAWQ's whole way: scales and clips found on random text, then packed."""
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    model: Any = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", torch_dtype=torch.float32)
    options = {"zero_point": True, "q_group_size": group, "w_bit": 4, "version": layout}
    options["modules_to_not_convert"] = ["mlp.gate"]
    model.quantize(
        AutoTokenizer.from_pretrained(source), quant_config=options, calib_data=text(4, 64), max_calib_samples=4,
        max_calib_seq_len=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        model.save_quantized(place)
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(place) / name, folder)


def logits(source: Path, folder: Path, group: int) -> torch.Tensor:
    """f32 [tokens, vocabulary] of a directory in gemm."""
    from awq.utils.packing_utils import dequantize_gemm
    from transformers import Qwen3MoeForCausalLM

    stored = load_file(folder / "model.safetensors")
    numbers = {name: tensor.float() for name, tensor in stored.items() if tensor.is_floating_point()}
    for name in [name for name in stored if name.endswith(".qweight")]:
        base = name.removesuffix("qweight")
        scales = numbers.pop(f"{base}scales")
        numbers[f"{base}weight"] = dequantize_gemm(stored[name], stored[f"{base}qzeros"], scales, 4, group).T
    model: Any = Qwen3MoeForCausalLM.from_pretrained(source, torch_dtype=torch.float32).eval()
    model.load_state_dict(numbers)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


def main() -> None:
    """Writes the archive."""
    with tempfile.TemporaryDirectory() as place:
        work, wide, twin = Path(place) / "work", Path(place) / "wide", Path(place) / "twin"
        work.mkdir()
        save_random(wide, layers=1, experts=2)
        said = {}
        for name, (layout, group) in LAYOUTS.items():
            quantize(wide, work / name, layout, group)
            if layout != "GEMM":
                quantize(wide, twin, "GEMM", group)
            said[name] = logits(wide, work / name if layout == "GEMM" else twin, group)
        save_file(said, work / "logits.safetensors")
        write_archive(work, HERE / "autoawq.tar.xz")


if __name__ == "__main__":
    main()
