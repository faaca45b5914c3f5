"""Linear layers on the CPU, their weights in their own format.

Native; plain formats go to torch for many tokens where its products in f32 are quicker (dense.py), even if the weight
is widened for the call.
"""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .dense import quicker_with_many
from .formats.registry import FORMATS
from .geometry import PLAIN_BYTES, Format, tensor_bytes
from .library import NativeLibraryError
from .native import FORMAT_NUMBERS, kernels
from .reference import as_multiplied
from .trunk_ops import native_trunk

FEW_TOKENS = 32


class Matrix(ctypes.Structure):
    """MoehiveMatrix of kernels/cpu/linear.h, field for field."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("format", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LinearWeights:
    """One matrix [rows, columns] in `format`; `blob` uint8 aligned to 64, `bias` f32 [rows]."""

    format: Format
    rows: int
    columns: int
    blob: torch.Tensor
    bias: torch.Tensor | None = None
    native: Matrix = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bias = None if self.bias is None else self.bias.data_ptr()
        matrix = Matrix(self.blob.data_ptr(), bias, self.rows, self.columns, FORMAT_NUMBERS[self.format])
        object.__setattr__(self, "native", matrix)

    @property
    def stored(self) -> torch.Tensor:
        """The blob's bytes as the format stores them; plain weights are [rows, columns] of their own type."""
        shape = (self.rows, self.columns)
        return FORMATS[self.format].view(self.blob[: tensor_bytes(self.format, *shape)], shape)

    @property
    def matrix(self) -> torch.Tensor:
        """The numbers that the weights mean, f32 [rows, columns]: a view of f32 weights, else made for the call."""
        return FORMATS[self.format].decode(self.stored, (self.rows, self.columns))

    @property
    def is_plain(self) -> bool:
        """Whether each number stands by itself."""
        return self.format in PLAIN_BYTES


class LinearOps:
    """Products of weights with some vectors. Calls release the GIL."""

    def __init__(self, threads: int) -> None:
        """`threads`: cores to use, at least 1. Raises NativeLibraryError."""
        library = native_trunk()
        self._handle = library.moehive_trunk_create(threads)
        if not self._handle:
            raise NativeLibraryError(f"The native library can't start {threads} threads for linear layers.")
        weakref.finalize(self, library.moehive_trunk_destroy, self._handle)
        self._native = library.moehive_linear
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._native.argtypes = (pointer, pointer, size, pointer, size, pointer)
        self._by_torch = quicker_with_many(kernels()[0])
        self._lists: dict[tuple[int, ...], ctypes.Array[Matrix]] = {}

    def linear(self, weights: LinearWeights, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x` f32 [T, columns], contiguous → f32 [T, rows], into `out` if given."""
        y = torch.empty(x.shape[0], weights.rows) if out is None else out
        if x.shape[0] <= FEW_TOKENS or weights.format not in self._by_torch:
            self._product(ctypes.addressof(weights.native), 1, x, y)
        else:
            torch.matmul(as_multiplied(weights.format, x), weights.matrix.T, out=y)
            if weights.bias is not None:
                y += weights.bias
        return y

    def linears(
        self, weights: Sequence[LinearWeights], x: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`linear` of matrices with the same input → f32 [T, sum of rows]."""
        y = torch.empty(x.shape[0], sum([one.rows for one in weights])) if out is None else out
        if x.shape[0] > FEW_TOKENS and any(one.format in self._by_torch for one in weights):
            return torch.cat([self.linear(one, x) for one in weights], 1, out=y)
        key = tuple([id(one) for one in weights])
        matrices = self._lists.get(key)
        if matrices is None:
            matrices = (Matrix * len(weights))(*(one.native for one in weights))
            self._lists[key] = matrices
            for one in weights:  # its number may become another's
                weakref.finalize(one, self._lists.pop, key, None)
        self._product(ctypes.addressof(matrices), len(weights), x, y)
        return y

    def _product(self, matrices: int, count: int, x: torch.Tensor, y: torch.Tensor) -> None:
        status = self._native(self._handle, matrices, count, x.data_ptr(), x.shape[0], y.data_ptr())
        if status == 2:
            raise MemoryError("There is no memory left for a linear layer's input.")
        if status:
            raise NativeLibraryError("The native library refuses a linear layer's arguments.")
