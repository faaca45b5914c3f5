"""Linear layers on the CPU, their weights in their own format."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .geometry import Format

_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeights:
    """One matrix [rows, columns] in `format`; `blob` uint8 aligned to 64, `bias` f32 [rows]."""

    format: Format
    rows: int
    columns: int
    blob: torch.Tensor
    bias: torch.Tensor | None = None


class LinearOps:
    """Products of weights with a few vectors."""

    def __init__(self, threads: int) -> None:
        """`threads`: cores to use, at least 1."""

    def linear(self, weights: LinearWeights, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x` f32 [T, columns] → f32 [T, rows]."""
        matrix = weights.blob.view(_DTYPES[weights.format])[: weights.rows * weights.columns]
        y = torch.nn.functional.linear(x, matrix.view(weights.rows, weights.columns).float(), weights.bias)
        return y if out is None else out.copy_(y)

    def linears(self, weights: Sequence[LinearWeights], x: torch.Tensor) -> torch.Tensor:
        """Matrices with the same input: `x` f32 [T, columns] → f32 [T, sum of rows]."""
        return torch.cat([self.linear(one, x) for one in weights], 1)
