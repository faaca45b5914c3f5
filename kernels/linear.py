"""Linear layers on the CPU, their weights in their own format: native for few tokens, torch for many."""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .geometry import Format
from .native import NativeLibraryError
from .trunk_ops import native_trunk

# Above this torch's products in f32 are quicker, even where the weight is widened for the call.
FEW_TOKENS = 32
_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_FORMATS = tuple(_DTYPES)  # in the order of the C side's enums


class _Matrix(ctypes.Structure):
    """MoehiveMatrix of kernels/cpu/plain_linear.cc, field for field."""

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
    native: _Matrix = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bias = None if self.bias is None else self.bias.data_ptr()
        matrix = _Matrix(self.blob.data_ptr(), bias, self.rows, self.columns, _FORMATS.index(self.format))
        object.__setattr__(self, "native", matrix)

    @property
    def matrix(self) -> torch.Tensor:
        """The weights as torch sees them, [rows, columns]; a view."""
        dtype = _DTYPES[self.format]
        size = self.rows * self.columns * dtype.itemsize
        return self.blob[:size].view(dtype).view(self.rows, self.columns)


class LinearOps:
    """Products of weights with some vectors. Calls release the GIL."""

    def __init__(self, threads: int) -> None:
        """`threads`: cores to use, at least 1. Raises NativeLibraryError."""
        library = native_trunk()
        self._handle = library.moehive_trunk_create(threads)
        if not self._handle:
            raise NativeLibraryError(f"The native library can't start {threads} threads for linear layers.")
        weakref.finalize(self, library.moehive_trunk_destroy, self._handle)
        self._native = library.moehive_plain_linear
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._native.argtypes = (pointer, pointer, size, pointer, size, pointer)
        self._lists: dict[tuple[int, ...], ctypes.Array[_Matrix]] = {}

    def linear(self, weights: LinearWeights, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x` f32 [T, columns], contiguous → f32 [T, rows], into `out` if given."""
        y = torch.empty(len(x), weights.rows) if out is None else out
        if len(x) <= FEW_TOKENS:
            self._few(ctypes.addressof(weights.native), 1, x, y)
        else:
            torch.matmul(x, weights.matrix.float().T, out=y)
            if weights.bias is not None:
                y += weights.bias
        return y

    def linears(self, weights: Sequence[LinearWeights], x: torch.Tensor) -> torch.Tensor:
        """Matrices with the same input: `x` f32 [T, columns], contiguous → f32 [T, sum of rows]."""
        if len(x) > FEW_TOKENS:
            return torch.cat([self.linear(one, x) for one in weights], 1)
        key = tuple([id(one) for one in weights])
        matrices = self._lists.get(key)
        if matrices is None:
            matrices = (_Matrix * len(weights))(*(one.native for one in weights))
            self._lists[key] = matrices
            for one in weights:  # its number may become another's
                weakref.finalize(one, self._lists.pop, key, None)
        y = torch.empty(len(x), sum([one.rows for one in weights]))
        self._few(ctypes.addressof(matrices), len(weights), x, y)
        return y

    def _few(self, matrices: int, count: int, x: torch.Tensor, y: torch.Tensor) -> None:
        status = self._native(self._handle, matrices, count, x.data_ptr(), len(x), y.data_ptr())
        if status == 2:
            raise MemoryError("There is no memory left for a linear layer's input.")
        if status:
            raise NativeLibraryError("The native library refuses a linear layer's arguments.")
