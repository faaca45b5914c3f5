#!/usr/bin/env python3
"""Makes the archive beside it: a small random model that GPTQModel quantized, in both versions of GPTQ's layout.

    GPTQMODEL_CPU_WORKERS=2 python tests/checkpoints/gptqmodel/make.py    # in an environment with gptqmodel 7.7

`gptqmodel.tar.xz` holds a directory for each of `KINDS`, as GPTQModel saved it, and `logits.safetensors` with what
transformers says to `TOKENS` when GPTQModel has read the directory back and dequantized its weights.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fixtures import TOKENS, save_random, text, write_archive  # noqa: E402 - beside this script's folder

KINDS: dict[str, dict[str, Any]] = {
    "usual": {"group_size": 128, "sym": True},
    "asymmetric": {"group_size": 128, "sym": False, "desc_act": False},
    "version_2": {"group_size": 32, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "ordered": {"group_size": 32, "sym": True, "desc_act": True},
    "ordered_version_2": {"group_size": 128, "sym": False, "desc_act": True, "format": "gptq_v2"},
    "one_group": {"group_size": -1, "sym": True, "desc_act": True},
}


def quantize(source: Path, folder: Path, options: dict[str, Any]) -> None:
    """GPTQModel's whole way: errors fed back as random text says, then packed."""
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(bits=4, offload_to_disk=False, **options), device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in text(4, 64)], batch_size=4)
    with tempfile.TemporaryDirectory() as place:
        model.save(place)
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(place) / name, folder)


def logits(source: Path, folder: Path) -> torch.Tensor:
    """f32 [tokens, vocabulary]."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from transformers import AutoModelForCausalLM

    theirs = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH).model
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if isinstance(module, BaseQuantLinear):
                module.scales = module.scales.float()
                model.get_submodule(name).weight.copy_(module.dequantize_weight().T)  # experts lie apart here, too
        return model(torch.tensor([TOKENS])).logits[0]


def main() -> None:
    """Writes the archive."""
    with tempfile.TemporaryDirectory() as place:
        work, wide = Path(place) / "work", Path(place) / "wide"
        work.mkdir()
        save_random(wide, layers=1, experts=2)
        said = {}
        for name, options in KINDS.items():
            quantize(wide, work / name, options)
            said[name] = logits(wide, work / name)
        save_file(said, work / "logits.safetensors")
        write_archive(work, HERE / "gptqmodel.tar.xz")


if __name__ == "__main__":
    main()
