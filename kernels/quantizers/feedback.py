"""A matrix in a block format, its rounding errors answered by the columns that are still to come.

GPTQ (Frantar et al., 2022, arXiv:2210.17323): columns are rounded in order, and each one's error is compensated in
those after it, as far as what they are multiplied with goes together. Scales of a block are fitted when its turn
comes, to the numbers as they are by then.
"""

from dataclasses import dataclass
from typing import Final

import torch

from .grids import GRIDS, Fit
from .rows import block_bytes

_DAMPING: Final = 0.02  # of the mean diagonal: keeps the inverse tame where few vectors were seen
_WIDEST: Final = 256  # columns of the largest block


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """How the vectors that a matrix is multiplied with go together: what `quantize` needs, made once for all formats.

    `importance` f32 [columns, padded to 256]: mean squares; `factor` f32 [the same twice]: upper Cholesky factor of
    the inverse of the second moments; None: errors are not compensated.
    """

    importance: torch.Tensor
    factor: torch.Tensor | None

    @classmethod
    def of(cls, moments: torch.Tensor) -> "Moments":
        """`moments` f32 [columns, columns]: the sum of x xᵀ over the vectors, each weighted as it counts."""
        width = -(-len(moments) // _WIDEST) * _WIDEST
        full = torch.zeros(width, width, dtype=torch.float64)
        full[: len(moments), : len(moments)] = moments
        full.diagonal().add_(_DAMPING * full.diagonal().sum().clamp_min(1e-12) / len(moments))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(full))
        return cls(full.diagonal().float(), torch.linalg.cholesky(inverse, upper=True).float())

    @classmethod
    def diagonal(cls, squares: torch.Tensor) -> "Moments":
        """`squares` f32 [columns]: mean squares of the vectors' entries, of which nothing else is known."""
        damped = squares + _DAMPING * squares.mean().clamp_min(1e-12)
        return cls(torch.nn.functional.pad(damped, (0, -len(squares) % _WIDEST)), None)


def quantize(name: str, weight: torch.Tensor, moments: Moments | None = None) -> torch.Tensor:
    """`weight` [rows, columns] of any float type → uint8 [rows, bytes of a row], a GGUF file's rows of type `name`.

    Without `moments` each column counts the same, and errors are not compensated. A row's bytes depend on no other
    row. Columns are padded to whole blocks with zeros.
    """
    grid = GRIDS[name]
    columns = weight.shape[1]
    width = -(-columns // grid.columns) * grid.columns
    w = torch.nn.functional.pad(weight.float(), (0, width - columns))
    stored = []
    for start in range(0, width, grid.columns):
        end = start + grid.columns
        importance = torch.ones(grid.columns) if moments is None else moments.importance[start:end]
        fit = grid.fit(w[:, start:end].contiguous(), importance)
        if moments is None or moments.factor is None:
            codes = grid.codes(w[:, start:end], *_spread(fit, grid.sub))
        else:
            codes, errors = _round(name, w[:, start:end], fit, moments.factor[start:end, start:end])
            w[:, end:] -= errors @ moments.factor[start:end, end:width]
        stored.append(block_bytes(name, codes, fit))
    return torch.cat(stored, 1)


def _spread(fit: Fit, sub: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A scale and a minimum for each column."""
    minimum = None if fit.minimum is None else fit.minimum.repeat_interleave(sub, 1)
    return fit.scale.repeat_interleave(sub, 1), minimum


def _round(name: str, block: torch.Tensor, fit: Fit, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of one block, column after column, and each column's error by its own factor: both [rows, columns]."""
    grid = GRIDS[name]
    scale, minimum = _spread(fit, grid.sub)
    left = block.T.contiguous()
    codes, errors = torch.empty(left.shape, dtype=torch.uint8), torch.empty_like(left)
    for column in range(len(left)):
        own = scale[:, column], None if minimum is None else minimum[:, column]
        codes[column] = grid.codes(left[column], *own)
        errors[column] = (left[column] - grid.numbers(codes[column], *own)) / inverse[column, column]
        left[column + 1 :] -= inverse[column, column + 1 :, None] * errors[column]
    return codes.T.contiguous(), errors.T.contiguous()
