"""Rows as they lie in a GGUF file, laid out anew as kernels compute them: the bits stay, their order changes."""

from typing import Final

import torch

from ..geometry import BLOCKS, GeometryError
from ..native import pack_rows

# Formats that have a file type of the same bits and the same name.
FILE_FORMATS: Final = (
    "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "mxfp4",
)  # fmt: skip


def pack_file_rows(name: str, rows: torch.Tensor, columns: int, out: torch.Tensor) -> None:
    """Lays `rows`, uint8 [rows, bytes of a row], of `columns` numbers each out in `out` (uint8 [tensor_bytes]).

    `name` is one of FILE_FORMATS. Raises GeometryError when the row's bytes are not those of `columns`, and for an
    MXFP4 scale that is not a number; NativeLibraryError.
    """
    block, nbytes = BLOCKS[name]
    blocks = -(-columns // block)
    if rows.dim() != 2 or rows.shape[1] != blocks * nbytes or rows.dtype != torch.uint8:
        raise GeometryError(
            f"A row of {columns} numbers in {name} has {blocks * nbytes} bytes, not {rows.shape[-1]}."
        )
    if name == "mxfp4" and (rows.view(len(rows), blocks, nbytes)[:, :, 0] == 255).any():
        raise GeometryError("The MXFP4 weights have a scale that is not a number.")
    pack_rows(name, rows.contiguous(), blocks, out)
