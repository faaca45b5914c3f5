"""Matrices of a pack's trunk in formats of their own: `trunk/matrices.bin`.

Each lies as kernels compute it, at a multiple of 4096 bytes; names are transformers' parameter names. The rest of the
trunk is a checkpoint that lacks them.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from moehive.kernels.formats.blocks import BLOCK_FORMATS
from moehive.kernels.geometry import BLOCKS, Format, GeometryError, tensor_bytes
from moehive.kernels.linear import LinearWeights

from ...types import CoordinatorError

NAME = "matrices.bin"
MAX_MATRICES = 4096
_MAX_NAME = 512  # characters
_MAX_SIZE = 1 << 24  # rows, and columns
_PAGE = 4096  # bytes


class TrunkMatrix(NamedTuple):
    """One matrix [rows, columns] in a block format."""

    name: str
    format: Format
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Of its blob."""
        return tensor_bytes(self.format, self.rows, self.columns)


Encode = Callable[[TrunkMatrix], Iterable[torch.Tensor]]  # a blob, uint8, in pieces


def offsets(matrices: Sequence[TrunkMatrix]) -> tuple[int, ...]:
    """Where each begins, and, last, where the file ends."""
    return tuple(accumulate((-(-one.nbytes // _PAGE) * _PAGE for one in matrices), initial=0))


def checked(packed: Any) -> tuple[TrunkMatrix, ...]:
    """What a manifest says. Raises GeometryError for what `write_matrices` would not have written."""
    if not isinstance(packed, list) or len(packed) > MAX_MATRICES:
        raise GeometryError(f"A pack's trunk has at most {MAX_MATRICES} matrices of its own.")
    found = []
    for name, format, rows, columns in packed:
        sound = (
            type(name) is str
            and 1 <= len(name) <= _MAX_NAME
            and format in BLOCK_FORMATS
            and all(type(size) is int and 1 <= size <= _MAX_SIZE for size in (rows, columns))
            and columns % BLOCKS[format][0] == 0
        )
        if not sound:
            raise GeometryError("A matrix of the pack's trunk has a name, format or size that can't be.")
        found.append(TrunkMatrix(name, cast(Format, format), rows, columns))
    if len({one.name for one in found}) != len(found):
        raise GeometryError("Two matrices of the pack's trunk have the same name.")
    return tuple(found)


def write_matrices(path: Path, matrices: Sequence[TrunkMatrix], encode: Encode) -> None:
    """Writes the file, to the disk. Raises OSError."""
    with path.open("wb") as out:
        for one, end in zip(matrices, offsets(matrices)[1:], strict=True):
            for piece in encode(one):
                out.write(cast(Any, piece.numpy()))
            out.write(bytes(end - out.tell()))
        out.flush()
        os.fsync(out.fileno())


def map_matrices(path: Path, matrices: Sequence[TrunkMatrix]) -> dict[str, LinearWeights]:
    """The matrices by name, in the file's own pages. Raises CoordinatorError."""
    places = offsets(matrices)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < places[-1]:
                raise CoordinatorError(f"{path} has become shorter; copy the pack again.")
            mapped = mmap.mmap(file.fileno(), places[-1], mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise CoordinatorError(f"{path} can't be read: {error.strerror}.") from error
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    return {
        one.name: LinearWeights(one.format, one.rows, one.columns, whole[begin : begin + one.nbytes])
        for one, begin in zip(matrices, places, strict=False)
    }
