"""What the scripts beside it share that write checkpoints with other projects' code: a small model, an archive.

All matrices are turns of three, by rows within blocks of 128, which each quantizer rounds alike where inputs are the
same, so that an archive, which finds what repeats, is small.
"""

import tarfile
from pathlib import Path
from typing import Any

import torch

TOKENS = [3, 17, 5, 99, 42, 8, 61, 7, 30, 77, 12, 110]  # that logits are kept of
VOCABULARY = 128
BLOCK = 128


def save_random(folder: Path, layers: int, experts: int) -> None:
    """A Qwen3-MoE in bf16 that asks all its experts, with a tokenizer, without which quantizers take no model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=BLOCK, moe_intermediate_size=BLOCK,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=experts,
        num_experts_per_tok=experts, norm_topk_prob=True, max_position_embeddings=256, tie_word_embeddings=False,
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
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)


def text(samples: int, length: int) -> list[list[int]]:
    """Random tokens for quantizers that watch what a model does."""
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(5)).tolist()


def write_archive(work: Path, archive: Path) -> None:
    """All files below `work` as `archive`, a tar.xz."""
    with tarfile.open(archive, "w:xz", preset=9) as out:
        for path in sorted(path for path in work.rglob("*") if path.is_file()):
            out.add(path, path.relative_to(work), filter=_plain)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that the same files make the same archive."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
