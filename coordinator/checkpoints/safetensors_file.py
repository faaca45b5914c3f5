"""Safetensors files read by position: only the bytes asked for, never a mapping of the file.

A mapped file's pages count as this process's memory, and a checkpoint may be a hundred times larger than the trunk;
`pread` into a tensor of our own keeps the coordinator's peak memory at what it really holds. The format: 8 bytes
(little-endian) with the header's size, the header (JSON: name → dtype, shape, [begin, end) in the data), the data.
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..types import CoordinatorError

MAX_HEADER = 100_000_000  # bytes; the format's own bound

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class LazyTensor(ABC):
    """A tensor that is not read yet, as transformers' loader takes it; indexing with `...` reads all of it."""

    __slots__ = ()

    dtype: torch.dtype
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Entries `start` to `stop` of the first dimension (all by default), as a new tensor."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole = self.read()
        return whole if index is Ellipsis else whole[index]

    def get_dtype(self) -> str:
        """The format's name of the dtype, as safetensors' own slices give it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def get_shape(self) -> list[int]:
        """The shape, as safetensors' own slices give it."""
        return list(self.shape)


@dataclass(frozen=True, slots=True)
class StoredTensor(LazyTensor):
    """One tensor of a file. `begin` is its first byte in the file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of the first dimension (all by default), as a new tensor.

        Raises CoordinatorError when the file ends too early or cannot be read.
        """
        if not self.shape:
            return self._bytes(0, self.nbytes).view(self.dtype)[0]
        stop = self.shape[0] if stop is None else stop
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._bytes(start * row, stop * row).view(self.dtype).reshape(stop - start, *self.shape[1:])

    def _bytes(self, start: int, stop: int) -> torch.Tensor:
        data = torch.empty(stop - start, dtype=torch.uint8)
        buffer: Any = data.numpy()
        view = memoryview(buffer)
        try:
            with self.path.open("rb", buffering=0) as file:
                done = 0
                while done < len(view):
                    count = os.preadv(file.fileno(), [view[done:]], self.begin + start + done)
                    if count == 0:
                        raise CoordinatorError(
                            f"{self.path} ends in the middle of {self.name}: it is truncated; copy it again."
                        )
                    done += count
        except OSError as error:
            raise CoordinatorError(f"{self.path} cannot be read: {error.strerror}.") from error
        return data


def read_header(path: Path) -> tuple[dict[str, StoredTensor], bytes]:
    """A file's tensors by name, and the header's bytes as they are in the file.

    Nothing in the header is believed: sizes, offsets and dtypes are checked against the file. Raises
    CoordinatorError, one sentence, for a file that is missing, unreadable, truncated or corrupt.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(MAX_HEADER, size - 8):
                raise CoordinatorError(
                    f"{path} is not a complete safetensors file ({size} bytes): it is truncated or corrupt;"
                    " copy it again."
                )
            raw = file.read(length)
    except FileNotFoundError as error:
        raise CoordinatorError(f"{path} is missing; copy or download the checkpoint again.") from error
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CoordinatorError(f"{path} is not a safetensors file: its header is not JSON; copy it again.") from error
    if not isinstance(header, dict):
        raise CoordinatorError(f"{path} is not a safetensors file: its header is not a JSON object; copy it again.")
    data_begin, data_size = 8 + length, size - 8 - length
    return {tensor.name: tensor for tensor in _tensors(path, header, data_begin, data_size)}, raw


def _tensors(path: Path, header: dict[str, Any], data_begin: int, data_size: int) -> Iterator[StoredTensor]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise CoordinatorError(f"{path} is corrupt: its header does not say what {name[:120]!r} is; copy it.")
        if not isinstance(code, str) or code not in DTYPES:
            raise CoordinatorError(
                f"{path} holds {name[:120]!r} as {str(code)[:40]!r}, which is not supported; known are"
                f" {', '.join(DTYPES)}."
            )
        if end > data_size:
            raise CoordinatorError(
                f"{path} is truncated: {name[:120]!r} ends at byte {data_begin + end}, the file at"
                f" {data_begin + data_size}; copy it again."
            )
        tensor = StoredTensor(path, name, DTYPES[code], tuple(shape), data_begin + begin)
        if tensor.nbytes != end - begin:
            raise CoordinatorError(
                f"{path} is corrupt: {name[:120]!r} of shape {tuple(shape)} has {end - begin} bytes; copy it again."
            )
        yield tensor
