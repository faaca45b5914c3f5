"""Files that are never half-written, and stay."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Gives a file that takes `path`'s place when the block ends: written beside, to the disk, renamed.

    `mode`: who may read it, less the umask. Raises OSError. When anything is raised, what was at `path` stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)  # its mode may be another
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def remove_halves(path: Path) -> None:
    """Removes what processes that were killed have left of `path`; nobody may write it now. Raises OSError."""
    for half in path.parent.glob(f".{escape(path.name)}.*"):
        half.unlink()


def sync_folder(folder: Path) -> None:
    """Makes renames and new files of a directory survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
