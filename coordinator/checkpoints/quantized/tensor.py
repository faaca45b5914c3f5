"""A tensor of a quantized checkpoint under the name that the same tensor has in an ordinary one, not read yet."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moehive.kernels.geometry import Format, GeometryError

from ...types import CoordinatorError
from ..safetensors_file import LazyTensor, StoredTensor
from .matrices import Matrix


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor(LazyTensor):
    """Codes, scales and what else makes up one matrix [out, in], or a stack of them [experts, out, in].

    It may stand where a StoredTensor does: `read` expands it. `format` is that in which kernels compute the same
    bits; None where there is none, and the numbers must be rounded to `dtype`. Where it is `transposed`, `shape` is
    [..., in, out], as transformers has it, but rows of the matrices are still [out].
    """

    name: str
    dtype: torch.dtype  # of what `read` gives
    shape: tuple[int, ...]
    format: Format | None
    parts: tuple[StoredTensor, ...]  # as they are in the files
    load: Callable[[int | None], Matrix]  # reads the matrix; of a stack, that of one expert
    row_block: int = 1  # rows that share scales
    transposed: bool = False

    def matrix(self, expert: int | None = None) -> Matrix:
        """Reads the matrix, or that of one expert of a stack. Raises CoordinatorError for parts that do not fit."""
        try:
            return self.load(expert)
        except GeometryError as error:
            raise CoordinatorError(f"{self.parts[0].path}: {self.name}: {error}") from error

    def pack(self, expert: int | None, rows: torch.Tensor | None, format: Format, out: torch.Tensor) -> None:
        """Writes the matrix (some of its rows, if given) into `out` in `format`. Raises CoordinatorError."""
        matrix = self.matrix(expert)
        try:
            (matrix if rows is None else matrix.take(rows)).pack(format, out)
        except GeometryError as error:
            raise CoordinatorError(f"{self.parts[0].path}: {self.name}: {error}") from error

    def numbers(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """What the bits mean, f32, of entries `start` to `stop` of the first dimension (all by default)."""
        if len(self.shape) == 2:
            return self._turned(self.matrix().numbers())[start:stop]
        experts = range(self.shape[0])[start:stop]
        return torch.stack([self._turned(self.matrix(expert).numbers()) for expert in experts])

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """As `numbers`, rounded to `dtype`."""
        return self.numbers(start, stop).to(self.dtype)

    def _turned(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T.contiguous() if self.transposed else matrix


AnyTensor = StoredTensor | QuantizedTensor
