#!/usr/bin/env python3
"""Makes the archive beside it: a small random model quantized by auto-round, in the formats of four projects.

    python tests/checkpoints/auto_round/make.py     # in an environment of its own, with auto-round 0.16.1

`auto_round.tar.xz` holds a directory for each of `FORMATS`, as auto-round saved it, and `logits.safetensors` with
what transformers says to `TOKENS` when auto-round's own code has read the directory back and dequantized it.
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

from fixtures import TOKENS, save_random, write_archive  # noqa: E402 - beside this script's folder

# Directory → auto-round's scheme and its export format.
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "auto_round": ({"scheme": "W4A16"}, "auto_round"),
    "auto_gptq": ({"scheme": "W4A16", "group_size": 64}, "auto_gptq"),
    "asymmetric": ({"scheme": "W4A16", "sym": False}, "auto_round:auto_gptq"),
    "auto_awq": ({"scheme": "W4A16", "sym": False}, "auto_awq"),
    "int4": ({"scheme": "W4A16", "group_size": 32}, "llm_compressor"),
    "int8": ({"scheme": "W8A16"}, "llm_compressor"),
    "fp8": ({"scheme": "FP8_BLOCK"}, "fp8"),
}


def quantize(source: Path, folder: Path, scheme: dict[str, Any], format: str) -> None:
    """Rounds to nearest, which needs no text, and leaves the checkpoint in `folder`."""
    from auto_round import AutoRound

    options = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "enable_torch_compile": False}
    with tempfile.TemporaryDirectory() as place:
        AutoRound(str(source), **options, **scheme).quantize_and_save(place, format=format)
        (weights,) = Path(place).rglob("*.safetensors")  # in a directory of its own, for some formats
        folder.mkdir()
        for path in (weights, weights.with_name("config.json")):
            shutil.copy(path, folder)


def logits(folder: Path, format: str) -> torch.Tensor:
    """f32 [tokens, vocabulary]. GPTQ's layout is read by auto-round, too."""
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    reader = {"quantization_config": AutoRoundConfig()} if format == "auto_gptq" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **reader).eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float()


def main() -> None:
    """Writes the archive."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        save_random(work / "wide", layers=2, experts=4)
        said = {}
        for name, (scheme, format) in FORMATS.items():
            quantize(work / "wide", work / name, scheme, format)
            # No CPU reads AWQ's layout; the same numbers lie in `asymmetric`.
            said[name] = logits(work / name, format) if name != "auto_awq" else said["asymmetric"].clone()
        save_file(said, work / "logits.safetensors")
        shutil.rmtree(work / "wide")
        write_archive(work, HERE / "auto_round.tar.xz")


if __name__ == "__main__":
    main()
