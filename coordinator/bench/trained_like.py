"""Small random models whose weights look trained, for measuring what rounding them does.

A plain random matrix is the worst case of every quantizer and has no structure to use. Trained ones have singular
values that fall like a power, a few channels that are much larger than the others, experts that are asked unequally
often, and layers that matter unequally; so have these. What they say means nothing; that rounding changes it can be
measured.
"""

from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

VOCABULARY: Final = 1024
CONFIGS: Final[dict[str, PreTrainedConfig]] = {
    "qwen3-moe-like": Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=VOCABULARY,
        hidden_size=512,
        moe_intermediate_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_experts=16,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        norm_topk_prob=True,
    ),
    "mixtral-like": MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    ),
}
_DECAY = 0.6  # of singular values: 1, 2^-0.6, 3^-0.6, …; about what attention and MLP matrices of small models have
_OUTLIERS = 0.02  # share of channels
_OUTLIER_SIZE = 4.0


def save_trained_like(config: PreTrainedConfig, folder: Path) -> None:
    """Writes a model of this shape in bf16, always the same."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.dim() == 1:
                tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
            elif "embed" in key or "lm_head" in key:
                scale = 1.0 if "embed" in key else 3.0 / tensor.shape[1] ** 0.5  # answers as sure as a model's
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
            else:
                layer = int(key.split(".layers.")[1].split(".")[0])
                size = 0.8 * (1.0 + layer) ** -0.4
                matrices = tensor.view(-1, *tensor.shape[-2:])
                for matrix in matrices:
                    matrix.copy_(size * _matrix(matrix.shape[0], matrix.shape[1], generator))
    model.bfloat16().save_pretrained(folder)


def texts(lengths: tuple[int, int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token ids to calibrate with and to measure on, int64 [256] each; frequent tokens are few, as in a language."""
    generator = torch.Generator().manual_seed(17)
    frequency = torch.arange(1, VOCABULARY + 1).float().reciprocal()
    tokens = torch.multinomial(frequency, sum(lengths), replacement=True, generator=generator)
    first, second = tokens.split(lengths)
    return list(first.split(256)), list(second.split(256))


def _matrix(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    left, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=generator))
    values = torch.arange(1, left.shape[1] + 1).float() ** -_DECAY
    matrix = left * values @ right.T
    loud = torch.rand(columns, generator=generator) < _OUTLIERS
    matrix[:, loud] *= _OUTLIER_SIZE
    scaled: torch.Tensor = matrix / matrix.square().sum(1).mean().sqrt()
    return scaled  # a row's products with unit noise have variance 1
