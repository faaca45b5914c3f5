"""A matrix in a block format, its rounding errors answered by the columns that are still to come.

GPTQ (Frantar et al., 2022, arXiv:2210.17323), natively: kernels/cpu/rounding.h and fit-inl.h have the method.
"""

from dataclasses import dataclass
from typing import Final

import torch

from ..geometry import BLOCKS
from ..native import round_rows
from .rows import Factors, block_bytes

_DAMPING: Final = 0.02  # of the mean diagonal: keeps the inverse tame where few vectors were seen
_WIDEST: Final = 256  # columns of the largest block
# The formats, each with the columns that share a scale; kernels/cpu/grids.h says which numbers they can express.
SUB_BLOCKS: Final = {
    "q2_k": 16, "q3_k": 16, "iq4_xs": 32, "q4_k": 32, "q5_k": 32, "q6_k": 16, "q8_0": 32, "iq4_nl": 32,
}  # fmt: skip


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
        full = moments.to(torch.float64, copy=True)
        damping = _DAMPING * full.diagonal().mean().clamp_min(1e-12)
        full.diagonal().add_(damping)
        padding = -len(full) % _WIDEST
        importance = torch.nn.functional.pad(full.diagonal(), (0, padding), value=float(damping))
        # With rows and columns in reverse order, the lower factor of the moments is the inverse of what is wanted.
        factor = _inverse(torch.linalg.cholesky(full.flip(0, 1))).flip(0, 1).float()
        factor = torch.nn.functional.pad(factor, (0, padding, 0, padding))
        factor.diagonal()[len(full) :] = damping.rsqrt()
        return cls(importance.float(), factor)

    @classmethod
    def diagonal(cls, squares: torch.Tensor) -> "Moments":
        """`squares` f32 [columns]: mean squares of the vectors' entries, of which nothing else is known."""
        damped = squares + _DAMPING * squares.mean().clamp_min(1e-12)
        return cls(torch.nn.functional.pad(damped, (0, -len(squares) % _WIDEST)), None)


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    """Of a lower triangle, by halves: products of whole matrices are what processors are quick at."""
    if len(lower) <= _WIDEST // 2:
        small: torch.Tensor = torch.linalg.solve_triangular(
            lower, torch.eye(len(lower), dtype=lower.dtype), upper=False
        )
        return small
    half = len(lower) // 2
    inverse = torch.zeros_like(lower, memory_format=torch.contiguous_format)
    inverse[:half, :half] = _inverse(lower[:half, :half])
    inverse[half:, half:] = _inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse


def quantize(name: str, weight: torch.Tensor, moments: Moments | None = None) -> torch.Tensor:
    """`weight` [rows, columns] of any float type → uint8 [rows, bytes of a row], a GGUF file's rows of type `name`.

    Without `moments` each column counts the same, and errors are not compensated. A row's bytes depend on no other
    row. Columns are padded to whole blocks with zeros. On as many threads as torch has here. Raises MemoryError,
    NativeLibraryError.
    """
    columns = BLOCKS[name][0]
    rows, blocks = len(weight), -(-weight.shape[1] // columns)
    subs = columns // SUB_BLOCKS[name]
    codes = torch.empty((rows * blocks, columns), dtype=torch.uint8)
    factors = Factors(
        d=torch.empty(rows * blocks, dtype=torch.float16),
        scales=torch.empty((rows * blocks, subs), dtype=torch.int8),
        m=torch.empty(rows * blocks, dtype=torch.float16),
        minimums=torch.empty((rows * blocks, subs), dtype=torch.uint8),
    )
    importance, factor = (None, None) if moments is None else (moments.importance, moments.factor)
    round_rows(name, weight.float().contiguous(), importance, factor, codes, factors)
    return block_bytes(name, codes, factors).view(rows, blocks * BLOCKS[name][1])
