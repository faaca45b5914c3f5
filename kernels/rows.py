"""Single rows of a matrix in a block format, as numbers: a table of tokens' vectors is read so (kernels/cpu/rows.cc).

For the few rows of a step one native call; the formats' own decoding in torch takes dozens of operations.
"""

import ctypes
import functools

import torch

from .geometry import Format
from .library import NativeLibraryError
from .linear import LinearWeights
from .native import FORMAT_NUMBERS
from .trunk_ops import native_trunk


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_trunk()
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.moehive_rows.argtypes = (pointer, pointer, size, pointer)
    library.moehive_file_rows.argtypes = (ctypes.c_int32, pointer, size, size, pointer, size, pointer)
    return library


def block_rows(weights: LinearWeights, ids: torch.Tensor) -> torch.Tensor:
    """The rows `ids` int64 [n] of weights in a block format: f32 [n, columns]. Raises NativeLibraryError."""
    out = torch.empty(len(ids), weights.columns)
    address = ctypes.addressof(weights.native)
    _check(_library().moehive_rows(address, ids.contiguous().data_ptr(), len(ids), out.data_ptr()))
    return out


def file_rows(format: Format, table: torch.Tensor, columns: int, ids: torch.Tensor) -> torch.Tensor:
    """The rows `ids` int64 [n] of a table as a GGUF file has it: uint8 [rows, bytes of a row], contiguous.

    `format` is one of formats.file_rows.FILE_FORMATS, whose blocks a row of `columns` numbers fills. Gives f32
    [n, columns]. Raises NativeLibraryError.
    """
    out = torch.empty(len(ids), columns)
    _check(
        _library().moehive_file_rows(
            FORMAT_NUMBERS[format],
            table.data_ptr(),
            len(table),
            columns,
            ids.contiguous().data_ptr(),
            len(ids),
            out.data_ptr(),
        )
    )
    return out


def _check(status: int) -> None:
    if status == 2:
        raise MemoryError("There is no memory left for a table's rows.")
    if status:
        raise NativeLibraryError("The native library refuses a table's format, or a row that it does not have.")
