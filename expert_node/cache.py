"""The node's disk cache of experts, so that a restart needs no network.

    <state>/cache/<fingerprint of the model>/<layer>-<expert>.<sha256 of the content>.expert
    <state>/cache/<fingerprint of the model>/<layer>-<expert>.part         an expert on its way

A file is written as `.part`, fsynced, and renamed once its hash is known to be right; the name then says what the
content must be. Other models' folders stay until their room is needed, the oldest goes first.
All methods block on the disk: call them in a thread.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from moehive.kernels.geometry import ExpertId

from .types import NodeError

log = logging.getLogger(__name__)

_FILE = re.compile(r"(\d{1,4})-(\d{1,5})\.([0-9a-f]{64})\.expert")
_READ_BYTES = 4 << 20
_SPARE_BYTES = 16 << 20  # room that the slice leaves on the disk, for logs and certificates


class CacheError(NodeError):
    """The disk is full or does not work; the sentence names the folder."""


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"The disk of {folder} is full: free some space or start the node with --state-dir on a larger disk."
            ) from error
        raise CacheError(f"Cannot use the disk cache in {folder}: {error.strerror or error}.") from error


def _read_into(path: Path, blob: memoryview, digest: _Hash) -> int:
    """Reads a file into the front of `blob` and into the hash; returns the bytes read, at most the blob's."""
    done = 0
    with path.open("rb", buffering=0) as file:
        while done < len(blob):
            count = file.readinto(blob[done : done + _READ_BYTES])
            if not count:
                break
            digest.update(blob[done : done + count])
            done += count
    return done


class PartFile:
    """One expert on its way to the disk; `offset` bytes of it are in `blob` and hashed."""

    def __init__(self, path: Path, blob: memoryview) -> None:
        self._path = path
        self._blob = blob
        self._digest: _Hash = hashlib.sha256()
        with _disk_errors(path.parent):
            path.touch()
            self.offset = _read_into(path, blob, self._digest)
            os.truncate(path, self.offset)  # a longer one is of another build
            self._file = path.open("ab", buffering=0)

    def append(self, data: bytes) -> None:
        """Adds the next bytes to file, blob and hash. Raises CacheError; the part is then gone."""
        end = self.offset + len(data)
        self._blob[self.offset : end] = data
        self._digest.update(self._blob[self.offset : end])
        try:
            with _disk_errors(self._path.parent):
                written = 0
                while written < len(data):
                    written += self._file.write(memoryview(data)[written:])
        except CacheError:
            self.discard()  # gives the room back
            raise
        self.offset = end

    @property
    def sha256(self) -> str:
        """Of the bytes so far, hexadecimal."""
        return self._digest.hexdigest()

    def keep(self) -> None:
        """Makes the whole and checked file durable under its final name. Raises CacheError."""
        try:
            with _disk_errors(self._path.parent):
                os.fsync(self._file.fileno())
                self._file.close()
                self._path.rename(self._path.with_name(f"{self._path.stem}.{self.sha256}.expert"))
        except CacheError:
            self.discard()
            raise

    def close(self) -> None:
        """Leaves the part for a later resume."""
        self._file.close()

    def discard(self) -> None:
        """Deletes the part."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class DiskCache:
    """The experts of one model on disk."""

    def __init__(self, root: Path, fingerprint: str) -> None:
        self._root = root
        self._folder = root / fingerprint
        with _disk_errors(root):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.utime(self._folder)  # the order in which other models' folders make room
        self._files: dict[ExpertId, Path] = {}
        for path in self._folder.iterdir():
            if match := _FILE.fullmatch(path.name):
                self._files[ExpertId(int(match[1]), int(match[2]))] = path

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._files

    def read(self, expert: ExpertId, blob: memoryview) -> bool:
        """Fills `blob` with a cached expert; False when there is none or it was damaged (it is then deleted)."""
        path = self._files.get(expert)
        if path is None:
            return False
        digest = hashlib.sha256()
        try:
            whole = path.stat().st_size == len(blob) and _read_into(path, blob, digest) == len(blob)
        except OSError as error:
            log.warning("Cannot read %s (%s); the expert is fetched again.", path, error.strerror)
            whole = False
        if whole and digest.hexdigest() == path.name.split(".")[1]:
            return True
        log.warning("%s is damaged: deleted, the expert is fetched again.", path)
        del self._files[expert]
        with _disk_errors(self._folder):
            path.unlink(missing_ok=True)
        return False

    def part(self, expert: ExpertId, blob: memoryview) -> PartFile:
        """Starts or resumes an expert's file; what was there is read into `blob`. Raises CacheError."""
        return PartFile(self._part(expert), blob)

    def part_bytes(self, expert: ExpertId, nbytes: int) -> int:
        """How many of an expert's `nbytes` an earlier, cut fetch has left here; always fewer than `nbytes`."""
        path = self._part(expert)
        size = path.stat().st_size if path.exists() else 0
        if size >= nbytes:  # whole but never checked, or of another build
            path.unlink()
            return 0
        return size

    def make_room(self, nbytes: int) -> None:
        """Sees to it that `nbytes` more fit, at the cost of other models' folders. Raises CacheError."""
        with _disk_errors(self._root):
            others = [path for path in self._root.iterdir() if path.is_dir() and path != self._folder]
            others.sort(key=lambda path: path.stat().st_mtime)
            while (free := shutil.disk_usage(self._root).free) < nbytes + _SPARE_BYTES:
                if not others:
                    raise CacheError(
                        f"The slice needs {nbytes} bytes of disk and {self._root} has {free} free: free some "
                        "space or start the node with --state-dir on a larger disk."
                    )
                oldest = others.pop(0)
                log.info("Removing the cached model %s to make room.", oldest.name[:12])
                shutil.rmtree(oldest)

    def _part(self, expert: ExpertId) -> Path:
        return self._folder / f"{expert.layer}-{expert.expert}.part"
