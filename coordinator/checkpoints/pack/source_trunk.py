"""The trunk of a source that is served in place: what of it is hashed, each by its own name.

Of a directory of safetensors: config and tokenizer by their files' names, the trunk's tensors by the checkpoint's.
Of a GGUF: the tensors; what its header says, the tokenizer too, is in the source's fingerprint.
"""

from pathlib import Path
from typing import NamedTuple

from ..checkpoint import Checkpoint
from ..gguf.checkpoint import GgufCheckpoint
from .hashing import hashed
from .manifest import TrunkPart
from .trunk import files_beside


class SourcePart(NamedTuple):
    """Bytes of one of the source's files."""

    path: Path
    begin: int
    nbytes: int


def hash_source(source: Checkpoint | GgufCheckpoint) -> tuple[TrunkPart, ...]:
    """The trunk of `source` with its hashes. Raises OSError, CoordinatorError."""
    return tuple(TrunkPart(name, part.nbytes, hashed(*part)) for name, part in _parts(source).items())


def damaged_parts(source: Checkpoint | GgufCheckpoint, wanted: tuple[TrunkPart, ...]) -> list[str]:
    """The names of those that are not as `hash_source` found them. Raises OSError, CoordinatorError."""
    parts = _parts(source)
    return [
        one.name
        for one in wanted
        if one.name not in parts or one.nbytes != parts[one.name].nbytes or hashed(*parts[one.name]) != one.digest
    ]


def _parts(source: Checkpoint | GgufCheckpoint) -> dict[str, SourcePart]:
    if isinstance(source, GgufCheckpoint):
        stored = [tensor.stored for tensor in source.trunk_stored()]
        files = []
    else:
        stored = list(source.trunk_stored().values())
        files = files_beside(source.path)
    found = {file.name: SourcePart(file, 0, file.stat().st_size) for file in files}
    return found | {tensor.name: SourcePart(tensor.path, tensor.begin, tensor.nbytes) for tensor in stored}
