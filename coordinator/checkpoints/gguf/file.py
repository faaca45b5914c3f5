"""GGUF files read by position: header and tensor infos, checked against the file before anything is allocated.

The format (ggml's docs/gguf.md): magic, version, counts; key-value pairs; tensor infos (name, sizes from the fastest
dimension on, type, offset in the data); padding; the data. A model may be split over files named
`…-00001-of-00003.gguf`. Little-endian only; versions 2 and 3, which differ in nothing that is read here.
"""

import hashlib
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ...regular_file import check_regular
from ...types import CoordinatorError
from ..links import refuse_links_out
from ..safetensors_file import StoredTensor
from .formats import TYPES, TensorType
from .other_types import why_not_read

MAX_PAIRS, MAX_TENSORS, MAX_PARTS = 65_536, 262_144, 4096
MAX_STRING = 64 << 20  # bytes; chat templates are the longest
MAX_DIMENSIONS = 4

_STRING, _ARRAY = 8, 9  # kinds of values; the others are numbers
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor, not read yet. `shape` is torch's: the last dimension is the fastest."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    stored: StoredTensor  # uint8 [rows, bytes of a row]; rows are all dimensions but the last

    def rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The bytes of some rows, uint8 [rows, bytes of a row]. Raises CoordinatorError when they can't be read."""
        return self.stored.read(start, stop)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A model's metadata (of the first part) and the tensors of all its parts."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    fingerprint: str  # 64 hexadecimal digits; see `open_gguf`


def open_gguf(path: Path) -> GgufFile:
    """Reads the headers of a file, or of all parts when it is one of a split model.

    The fingerprint is SHA-256 over each part's name, size, time of last change (nanoseconds) and header, as that of
    a directory of safetensors. Raises CoordinatorError, one sentence, for whatever is missing, truncated or corrupt.
    """
    digest = hashlib.sha256()
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(_parts(path)):
        values, found = _read_header(part, digest)
        if number == 0:
            metadata = values
        if twice := sorted(tensors.keys() & found.keys()):
            raise CoordinatorError(f"{part} holds {twice[0]!r}, which another part holds too; download it again.")
        tensors |= found
    expected = metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CoordinatorError(f"{path} should have {expected} tensors but has {len(tensors)}; download it again.")
    return GgufFile(path, metadata, tensors, digest.hexdigest())


class Readable(Protocol):
    """Where a header comes from."""

    def read(self, count: int, /) -> bytes:
        """The next bytes, fewer at the end."""
        ...


def header_size(path: Path, file: Readable, size: int) -> int:
    """Reads the header, and no more, of a file of `size` bytes, and returns its length.

    `path` names it in errors. Raises CoordinatorError as `open_gguf` does.
    """
    reader = _Reader(path, file, size)
    _header(reader)
    return reader.position


def first_part(path: Path) -> Path:
    """The part of a model that holds its metadata: the file itself unless it is split."""
    return _parts(path)[0]


def _parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count <= MAX_PARTS:
        raise CoordinatorError(f"{path} is not named as a part of a split model; rename it as it was downloaded.")
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise CoordinatorError(f"{missing[0]} is missing, one of the model's {count} parts; download it too.")
    # The one that was named may be a link to anywhere; the others must lie beside it, or beside what it is a link to,
    # as in the hub's cache.
    others = (part for part in parts if part != path)
    refuse_links_out(others, (path.parent, path.resolve().parent), "the model's directory")
    return parts


def _read_header(path: Path, digest: Any) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        check_regular(path)
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            reader = _Reader(path, file, stat.st_size)
            metadata, infos = _header(reader)
            end = reader.position
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
            file.seek(0)
            while end > 0:
                block = file.read(min(end, 1 << 20))
                if not block:
                    raise reader.corrupt("it became shorter while it was read")
                digest.update(block)
                end -= len(block)
    except FileNotFoundError as error:
        raise CoordinatorError(f"There is no file {path}; give a GGUF file or a directory of safetensors.") from error
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}.") from error
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment % 8:
        raise reader.corrupt(f"its alignment is {alignment!r}")
    data = -(-reader.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, sizes, code, offset in infos:
        kind = TYPES.get(code)
        if kind is None:
            raise CoordinatorError(f"{path} holds {name[:80]!r} {why_not_read(code)}.")
        shape = tuple(reversed(sizes))
        if shape[-1] % kind.block:
            raise reader.corrupt(f"{name!r} has rows of {shape[-1]} numbers in blocks of {kind.block}")
        row_bytes = shape[-1] // kind.block * kind.nbytes
        rows = math.prod(shape[:-1])
        if offset % alignment or data + offset + rows * row_bytes > stat.st_size:
            raise reader.corrupt(f"{name!r} does not lie within it")
        if name in tensors:
            raise reader.corrupt(f"it holds {name!r} twice")
        stored = StoredTensor(path, name, torch.uint8, (rows, row_bytes), data + offset)
        tensors[name] = GgufTensor(name, kind, shape, stored)
    return metadata, tensors


def _header(reader: "_Reader") -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
    if reader.take(4) != b"GGUF":
        raise CoordinatorError(f"{reader.path} is not a GGUF file; give one, or a directory of safetensors.")
    version = reader.number("I")
    if version not in (2, 3):
        raise CoordinatorError(
            f"{reader.path} is GGUF of version {version}, or big-endian; only versions 2 and 3, little-endian, can be"
            " read, so convert the model again."
        )
    tensor_count, pair_count = reader.number("Q"), reader.number("Q")
    if tensor_count > MAX_TENSORS or pair_count > MAX_PAIRS:
        raise reader.corrupt(f"it claims {tensor_count} tensors and {pair_count} values")
    metadata = {reader.string(): reader.value(reader.number("I")) for _ in range(pair_count)}
    infos = []
    for _ in range(tensor_count):
        name, dimensions = reader.string(), reader.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise reader.corrupt(f"{name[:80]!r} has {dimensions} dimensions")
        sizes = tuple(reader.number("Q") for _ in range(dimensions))
        if 0 in sizes:
            raise reader.corrupt(f"{name[:80]!r} is empty")
        infos.append((name, sizes, reader.number("I"), reader.number("Q")))
    return metadata, infos


class _Reader:
    """Reads a header's values; never more than the file still has."""

    def __init__(self, path: Path, file: Readable, size: int) -> None:
        self.path = path
        self.position = 0
        self._file = file
        self._size = size

    def corrupt(self, what: str) -> CoordinatorError:
        return CoordinatorError(f"{self.path} is truncated or corrupt ({what}); download it again.")

    def take(self, count: int) -> bytes:
        if count > self._size - self.position:
            raise self.corrupt("its header is longer than the file")
        data = self._file.read(count)
        if len(data) != count:
            raise self.corrupt("it became shorter while it was read")
        self.position += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise self.corrupt(f"it has a text of {length} bytes")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise self.corrupt(f"it has a value of kind {kind}")
        element, count = self.number("I"), self.number("Q")
        if element == _STRING and count <= (self._size - self.position) // 8:
            return [self.string() for _ in range(count)]
        if element in _NUMBERS:
            code = f"<{count}{_NUMBERS[element]}"
            if count <= self._size - self.position:
                return list(struct.unpack(code, self.take(struct.calcsize(code))))
        raise self.corrupt(f"it has a list of {count} values of kind {element}")
