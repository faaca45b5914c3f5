#!/usr/bin/env python3
"""Makes the archive beside it: a small random model quantized by auto-round, in the formats of four projects.

    python tests/checkpoints/auto_round/make.py     # in an environment of its own, with auto-round 0.16.1

`auto_round.tar.xz` holds a directory for each of `FORMATS`, as auto-round saved it, and `logits.safetensors` with
what transformers says to `TOKENS` when auto-round's own code has read the directory back and dequantized it.

All matrices are turns of three, by rows within blocks of 128, which each quantizer rounds alike, so that the archive,
which finds what repeats, is small.
"""

import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
TOKENS = [3, 17, 5, 99, 42, 8, 61, 7, 30, 77, 12, 110]
BLOCK = 128
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


def save_random(folder: Path) -> None:
    """A Qwen3-MoE in bf16 with a tokenizer, without which auto-round takes no model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=256, intermediate_size=BLOCK, moe_intermediate_size=BLOCK, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=4, num_experts_per_tok=4,
        norm_topk_prob=True, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    model: Any = Qwen3MoeForCausalLM(config)
    bases: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
            elif "proj" not in name:  # router, table, head
                parameter.copy_(1.5 * torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
            else:
                columns = parameter.shape[-1]
                base = bases.setdefault(columns, torch.randn(2, BLOCK, columns) * columns**-0.5)
                for number, block in enumerate(parameter.view(-1, BLOCK, columns)):
                    turn = 8 * int(torch.randint(BLOCK // 8, ()))  # AWQ packs eight rows
                    block.copy_(base[number % 2].roll(turn, 0))
    model.to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)


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
        save_random(work / "wide")
        said = {}
        for name, (scheme, format) in FORMATS.items():
            quantize(work / "wide", work / name, scheme, format)
            # No CPU reads AWQ's layout; the same numbers lie in `asymmetric`.
            said[name] = logits(work / name, format) if name != "auto_awq" else said["asymmetric"].clone()
        save_file(said, work / "logits.safetensors")
        shutil.rmtree(work / "wide")
        with tarfile.open(HERE / "auto_round.tar.xz", "w:xz", preset=9) as archive:
            for path in sorted(path for path in work.rglob("*") if path.is_file()):
                archive.add(path, path.relative_to(work), filter=_plain)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that the same files make the same archive."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
