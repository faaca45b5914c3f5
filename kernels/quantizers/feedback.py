"""A matrix in a block format, its rounding errors answered by the columns that are still to come.

GPTQ (Frantar et al., 2022, arXiv:2210.17323): columns are rounded in order, and each one's error is compensated in
those after it, as far as what they are multiplied with goes together. Scales of a block are fitted when its turn
comes, to the numbers as they are by then.
"""

import torch

from .grids import GRIDS, Fit
from .rows import block_bytes

_DAMPING = 0.02  # of the mean diagonal: keeps the inverse tame where few vectors were seen


def quantize(name: str, weight: torch.Tensor, moments: torch.Tensor | None = None) -> torch.Tensor:
    """`weight` f32 [rows, columns] → uint8 [rows, bytes of a row], a GGUF file's rows of type `name`.

    `moments` f32 [columns, columns] is the sum of x xᵀ over the vectors that the matrix is multiplied with; None:
    each column counts the same and errors are not compensated. Columns are padded to whole blocks with zeros.
    """
    grid = GRIDS[name]
    columns = weight.shape[1]
    width = -(-columns // grid.columns) * grid.columns
    w = torch.nn.functional.pad(weight.float(), (0, width - columns))
    inverse = None
    importance = torch.ones(width)
    if moments is not None:
        moments, inverse = _prepared(moments, width)
        importance = moments.diagonal()
    stored = []
    for start in range(0, width, grid.columns):
        end = start + grid.columns
        fit = grid.fit(w[:, start:end].contiguous(), importance[start:end])
        if inverse is None:
            codes = grid.codes(w[:, start:end], *_spread(fit, grid.sub))
        else:
            codes, errors = _round(name, w[:, start:end], fit, inverse[start:end, start:end])
            w[:, end:] -= errors @ inverse[start:end, end:]
        stored.append(block_bytes(name, codes, fit))
    return torch.cat(stored, 1)


def _spread(fit: Fit, sub: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A scale and a minimum for each column."""
    minimum = None if fit.minimum is None else fit.minimum.repeat_interleave(sub, 1)
    return fit.scale.repeat_interleave(sub, 1), minimum


def _prepared(moments: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Damped moments [width, width], and the upper factor of their inverse."""
    full = torch.zeros(width, width)
    full[: len(moments), : len(moments)] = moments
    mean = full.diagonal().mean().clamp_min(1e-12)
    full.diagonal().add_(_DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(full.double()))
    return full, torch.linalg.cholesky(inverse, upper=True).float()


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
