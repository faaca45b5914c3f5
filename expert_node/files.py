"""The node's state folder: one process at a time; small private files, written beside, fsynced, renamed."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .types import NodeError


def write_private(path: Path, data: bytes) -> None:
    """Replaces `path` (mode 0600) in a folder of mode 0700, made if missing. Raises NodeError."""
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside.unlink(missing_ok=True)  # its mode may be another
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError as error:
        raise NodeError(
            f"Cannot write {path} ({error.strerror or error}): free space on that disk, check who owns the folder, "
            "or choose another one with --state-dir."
        ) from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes the folder if it is missing and keeps other nodes out of it. Raises NodeError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NodeError(
            f"Cannot use the state folder {folder} ({error.strerror or error}): check who owns it, or choose another "
            "one with --state-dir."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NodeError(
                f"Another node runs with the state folder {folder}: stop it, or choose another one with --state-dir."
            ) from error
        yield
    finally:
        os.close(descriptor)
