"""Which experts of a half-made pack are finished: a file that only grows, so that a kill loses its last lines only.

A header (magic, identity of the conversion), then a record for each expert: layer, number, hash of its blob, and
CRC-32 of the record. A record is appended after its expert's bytes are on the disk. What follows the last whole
record is cut off when the journal is opened again.
"""

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

from moehive.kernels.geometry import ExpertId, Manifest

from .unfinished import JOURNAL, another_beginning

_MAGIC = b"MHPACK02"  # 01 had SHA-256
_HEADER = len(_MAGIC) + 32
_BODY = struct.Struct("<II32s")
_RECORD = _BODY.size + 4


class Journal:
    """Opened for one conversion; `finished` maps each finished expert to its hash."""

    def __init__(self, folder: Path, identity: bytes, manifest: Manifest) -> None:
        """Makes the journal of a new conversion, or goes on with the one in `folder`.

        `identity`: 32 bytes, see `identity_of`. Raises OSError, and CoordinatorError when `folder` holds the
        journal of another conversion.
        """
        self._path = folder / JOURNAL
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            data = self._path.read_bytes()
            header = _MAGIC + identity
            if len(data) >= _HEADER and data[:_HEADER] != header:
                raise another_beginning(folder)
            if len(data) < _HEADER:  # new, or killed while the header was written
                os.ftruncate(self._descriptor, 0)
                _write(self._descriptor, header, 0)
                os.fsync(self._descriptor)
                data = header
            self.finished = _records(data, manifest)
            self._size = _HEADER + len(self.finished) * _RECORD
            os.ftruncate(self._descriptor, self._size)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, done: Iterable[tuple[ExpertId, bytes]]) -> None:
        """Records finished experts with their hashes; they count from here on. Raises OSError: then none does."""
        done = list(done)
        bodies = [_BODY.pack(expert.layer, expert.expert, digest) for expert, digest in done]
        data = b"".join(body + zlib.crc32(body).to_bytes(4, "little") for body in bodies)
        _write(self._descriptor, data, self._size)
        os.fsync(self._descriptor)
        self._size += len(data)
        self.finished.update(done)

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._descriptor)


def _records(data: bytes, manifest: Manifest) -> dict[ExpertId, bytes]:
    finished: dict[ExpertId, bytes] = {}
    for start in range(_HEADER, len(data) - _RECORD + 1, _RECORD):
        body = data[start : start + _BODY.size]
        if zlib.crc32(body).to_bytes(4, "little") != data[start + _BODY.size : start + _RECORD]:
            break
        layer, number, digest = _BODY.unpack(body)
        expert = ExpertId(layer, number)
        if layer >= len(manifest.layers) or number >= manifest.layers[layer].experts or expert in finished:
            break
        finished[expert] = digest
    return finished


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
