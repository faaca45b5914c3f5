"""The node's disk cache of experts, so that a restart needs no network.

    <state>/cache/<fingerprint of the model>/<layer>-<expert>.<hash of the content>.expert
    <state>/cache/<fingerprint of the model>/<layer>-<expert>.part         an expert on its way

A file is written as `.part` and renamed once its hash is known to be right; the name then says what the content must
be, and a restart checks it. So nothing waits for the disk: what a power cut takes is fetched again. Whole files are
mapped, so the kernel's page cache is the one copy in memory. Other models' folders stay until their room is needed,
the oldest goes first.
All methods block on the disk: call them in a thread.
"""

import errno
import logging
import mmap
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moehive.kernels.digest import Digest, new_digest
from moehive.kernels.geometry import ExpertId

from .types import NodeError

log = logging.getLogger(__name__)

_FILE = re.compile(r"(\d{1,4})-(\d{1,5})\.([0-9a-f]{64})\.expert")
_READ_BYTES = 4 << 20
_SPARE_BYTES = 16 << 20  # room that the slice leaves on the disk, for logs and certificates


class CacheError(NodeError):
    """The disk is full or does not work; the sentence names the folder."""


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"The disk of {folder} is full: free some space or start the node with --state-dir on a larger disk."
            ) from error
        raise CacheError(
            f"Cannot use the disk cache in {folder} ({error.strerror or error}): check who owns it, or start the "
            "node with another --state-dir."
        ) from error


def _read_into(path: Path, digest: Digest, nbytes: int) -> int:
    """Reads a file into the hash; returns the bytes read, at most `nbytes`."""
    done = 0
    with path.open("rb", buffering=0) as file:
        nbytes = min(nbytes, os.fstat(file.fileno()).st_size)
        piece = memoryview(bytearray(min(_READ_BYTES, nbytes)))
        while done < nbytes:
            count = file.readinto(piece[: nbytes - done])
            if not count:
                break
            digest.update(piece[:count])
            done += count
    return done


def _delete(path: Path) -> None:
    """Whatever lies there, a folder too: the cache is the node's own. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        log.warning("%s is a folder where an expert belongs: deleted.", path)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def mapped(path: Path, nbytes: int) -> torch.Tensor:
    """The file as uint8 [nbytes], aligned to a page; its pages are in memory now. Raises CacheError."""
    try:
        # Not Python's mmap: it keeps a descriptor for each file, and a slice has thousands.
        blob = torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise CacheError(f"Cannot map {path} into memory: {str(error).splitlines()[0]}") from error
    blob[:: mmap.PAGESIZE].max()  # looks at each page, or the first request would wait for them
    return blob


class PartFile:
    """One expert of `nbytes` on its way to the disk; `offset` bytes of it are there and hashed."""

    def __init__(self, path: Path, nbytes: int, kept: Callable[[Path], None]) -> None:
        """`kept` is told of the whole file."""
        self._path = path
        self._nbytes = nbytes
        self._kept = kept
        self._digest = new_digest()
        with _disk_errors(path.parent):
            path.touch()
            self.offset = _read_into(path, self._digest, nbytes)
            self.resumed = self.offset > 0
            os.truncate(path, self.offset)  # a longer one is of another build
            self._file = path.open("ab", buffering=0)

    def append(self, view: memoryview) -> None:
        """Adds the next bytes to file and hash, at most up to `nbytes`. Raises CacheError; the part is then gone."""
        if self.offset + len(view) > self._nbytes:
            raise ValueError("These are more bytes than the expert has.")
        self._digest.update(view)
        try:
            with _disk_errors(self._path.parent):
                written = 0
                while written < len(view):
                    written += self._file.write(view[written:])
        except CacheError:
            self.discard()  # gives the room back
            raise
        self.offset += len(view)

    @property
    def digest(self) -> bytes:
        """The hash of the bytes so far."""
        return self._digest.digest()

    def keep(self) -> torch.Tensor:
        """Gives the whole and checked file its final name; returns it mapped, uint8 [nbytes].

        Raises CacheError.
        """
        final = self._path.with_name(f"{self._path.stem}.{self.digest.hex()}.expert")
        try:
            with _disk_errors(self._path.parent):
                self._file.close()
                self._path.rename(final)
        except CacheError:
            self.discard()
            raise
        self._kept(final)
        return mapped(final, self._nbytes)

    def close(self) -> None:
        """Leaves the part for a later resume."""
        self._file.close()

    def discard(self) -> None:
        """Deletes the part."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class DiskCache:
    """The experts of one model on disk."""

    def __init__(self, root: Path, fingerprint: str, former: "DiskCache | None" = None) -> None:
        """`former`: an earlier object, whose word on what is right is taken. Raises CacheError."""
        self.fingerprint = fingerprint
        self._root = root
        self._folder = root / fingerprint
        with _disk_errors(root):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.utime(self._folder)  # the order in which other models' folders make room
        self._files: dict[ExpertId, Path] = {}
        self._checked: dict[ExpertId, Path] = {}
        for path in self._folder.iterdir():
            if match := _FILE.fullmatch(path.name):
                self._files[ExpertId(int(match[1]), int(match[2]))] = path
        if former is not None:
            self._checked = {
                expert: path for expert, path in former._checked.items() if self._files.get(expert) == path
            }

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._files

    def checked(self, expert: ExpertId) -> Path | None:
        """The file of an expert whose content was found right since this object was made."""
        return self._checked.get(expert)

    def load(self, expert: ExpertId, nbytes: int) -> torch.Tensor | None:
        """A cached expert, mapped: uint8 [nbytes]. None when there is none or it was damaged (it is then deleted).

        Raises CacheError.
        """
        path = self._files.get(expert)
        if path is None:
            return None
        digest = new_digest()
        try:
            whole = path.stat().st_size == nbytes and _read_into(path, digest, nbytes) == nbytes
        except OSError as error:
            log.warning("Cannot read %s (%s); the expert is fetched again.", path, error.strerror)
            whole = False
        if whole and digest.hexdigest() == path.name.split(".")[1]:
            self._checked[expert] = path
            return mapped(path, nbytes)
        log.warning("%s is damaged: deleted, the expert is fetched again.", path)
        del self._files[expert]
        self._checked.pop(expert, None)
        with _disk_errors(self._folder):
            _delete(path)
        return None

    def part(self, expert: ExpertId, nbytes: int) -> PartFile:
        """Starts or resumes the file of an expert of `nbytes`. Raises CacheError."""

        def kept(path: Path) -> None:
            self._files[expert] = self._checked[expert] = path

        return PartFile(self._part(expert), nbytes, kept)

    def part_bytes(self, expert: ExpertId, nbytes: int) -> int:
        """How many of an expert's `nbytes` an earlier, cut fetch has left here; always fewer than `nbytes`.

        What is no such part is deleted. Raises CacheError.
        """
        path = self._part(expert)
        with _disk_errors(self._folder):
            try:
                found = path.lstat()
            except FileNotFoundError:
                return 0
            if stat.S_ISREG(found.st_mode) and found.st_size < nbytes:
                return found.st_size
            _delete(path)  # whole but never checked, of another build, or no file
        return 0

    def make_room(self, nbytes: int) -> None:
        """Sees to it that `nbytes` more fit, at the cost of other models' folders. Raises CacheError."""
        with _disk_errors(self._root):
            others = [path for path in self._root.iterdir() if path.is_dir() and path != self._folder]
            others.sort(key=lambda path: path.stat().st_mtime)
            while (free := shutil.disk_usage(self._root).free) < nbytes + _SPARE_BYTES:
                if not others:
                    raise CacheError(
                        f"The slice needs {nbytes / 1e6:,.1f} MB of disk and {self._root} has {free / 1e6:,.1f} MB "
                        "free: free some space or start the node with --state-dir on a larger disk."
                    )
                oldest = others.pop(0)
                log.info("Removing the cached model %s to make room.", oldest.name[:12])
                shutil.rmtree(oldest)

    def _part(self, expert: ExpertId) -> Path:
        return self._folder / f"{expert.layer}-{expert.expert}.part"
