"""The trunk of a pack: a checkpoint of the source's own kind that holds everything but routed experts.

Tensors are copied byte for byte, a few megabytes at a time, under the names and in the formats of the source. Of a
directory of safetensors: config.json, the tokenizer's files, one model.safetensors, and matrices.bin for what gets
another format. Of a GGUF: one trunk.gguf with the source's own metadata.
"""

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ...types import CoordinatorError
from ...whole_file import sync_folder
from ..checkpoint import Checkpoint
from ..gguf.checkpoint import GgufCheckpoint
from ..gguf.file import GgufTensor, first_part
from ..gguf.formats import TYPES
from ..safetensors_file import DTYPES, StoredTensor
from . import matrices as own
from .hashing import hashed
from .manifest import TRUNK, TrunkPart

GGUF_NAME = "trunk.gguf"
_BESIDE = ("*.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.jinja", "*.tiktoken")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")
_LARGEST_BESIDE = 256 << 20  # bytes of one tokenizer's file
_PIECE = 8 << 20  # bytes copied at once


def write_trunk(
    folder: Path,
    source: Checkpoint | GgufCheckpoint,
    matrices: Sequence[own.TrunkMatrix] = (),
    encode: own.Encode | None = None,
) -> None:
    """Makes `folder`/trunk, all or nothing; one that is there already is kept.

    `matrices`, of a directory of safetensors, are written as `encode` gives them instead of as the source has them.
    Raises OSError, CoordinatorError.
    """
    done = folder / TRUNK
    if done.exists():
        return
    part = folder / f".{TRUNK}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    if isinstance(source, GgufCheckpoint):
        _write_gguf(part / GGUF_NAME, source)
    else:
        for file in files_beside(source.path):
            if file.stat().st_size > _LARGEST_BESIDE:
                raise CoordinatorError(f"{file} is too large for a tokenizer's file or a config; move it elsewhere.")
            shutil.copyfile(file, part / file.name)
            _sync(part / file.name)
        _write_safetensors(part / "model.safetensors", _copied(source, matrices))
        if encode is not None:
            own.write_matrices(part / own.NAME, matrices, encode)
    sync_folder(part)
    part.rename(done)
    sync_folder(folder)


def trunk_bytes(source: Checkpoint | GgufCheckpoint, matrices: Sequence[own.TrunkMatrix] = ()) -> int:
    """Bytes of the tensors and files that `write_trunk` writes; the headers of some kilobytes come on top."""
    if isinstance(source, GgufCheckpoint):
        return sum(tensor.stored.nbytes for tensor in source.trunk_stored())
    copied = sum(tensor.nbytes for tensor in _copied(source, matrices).values())
    return copied + sum(file.stat().st_size for file in files_beside(source.path)) + own.offsets(matrices)[-1]


def hash_trunk(folder: Path) -> tuple[TrunkPart, ...]:
    """The files of `folder`/trunk with their hashes. Raises OSError, CoordinatorError."""
    sizes = {path: path.stat().st_size for path in sorted((folder / TRUNK).iterdir())}
    return tuple(TrunkPart(path.name, nbytes, hashed(path, 0, nbytes)) for path, nbytes in sizes.items())


def files_beside(directory: Path) -> list[Path]:
    """Config and tokenizer of a checkpoint's directory."""
    found = {file for pattern in _BESIDE for file in directory.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not file.name.endswith(_WEIGHTS))


def _copied(source: Checkpoint, matrices: Sequence[own.TrunkMatrix]) -> dict[str, StoredTensor]:
    """The stored tensors of the trunk that are not in `matrices`, by name."""
    plain = source.trunk_tensors().plain_matrices()
    others = {plain[one.name] for one in matrices if one.name in plain}
    return {name: tensor for name, tensor in source.trunk_stored().items() if name not in others}


def _write_safetensors(path: Path, tensors: dict[str, StoredTensor]) -> None:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            _copy(tensor, out)
        out.flush()
        os.fsync(out.fileno())


def _write_gguf(path: Path, source: GgufCheckpoint) -> None:
    pairs, alignment = _raw_pairs(source.path)
    tensors = source.trunk_stored()
    infos, offset = b"", 0
    for tensor in tensors:
        infos += _info(tensor, offset)
        offset += -(-tensor.stored.nbytes // alignment) * alignment
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)) + b"".join(pairs) + infos
    with path.open("wb") as out:
        out.write(head + bytes(-len(head) % alignment))
        for tensor in tensors:
            _copy(tensor.stored, out)
            out.write(bytes(-tensor.stored.nbytes % alignment))
        out.flush()
        os.fsync(out.fileno())


def _raw_pairs(path: Path) -> tuple[list[bytes], int]:
    """A GGUF's metadata, each pair's bytes as they are, without what a split file adds; and its alignment."""
    from gguf import GGUFReader

    reader = GGUFReader(first_part(path))
    kept = [field for name, field in reader.fields.items() if not name.startswith(("GGUF.", "split."))]
    return [b"".join(bytes(part) for part in field.parts) for field in kept], int(reader.alignment)


def _info(tensor: GgufTensor, offset: int) -> bytes:
    name = tensor.name.encode()
    code = next(number for number, kind in TYPES.items() if kind == tensor.type)
    sizes = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape)) + sizes + struct.pack(
        "<IQ", code, offset
    )  # fmt: skip


def _copy(tensor: StoredTensor, out: BinaryIO) -> None:
    left = tensor.nbytes
    with tensor.path.open("rb") as file:
        file.seek(tensor.begin)
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise CoordinatorError(f"{tensor.path} ends in the middle of {tensor.name}: copy it again.")
            out.write(piece)
            left -= len(piece)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
