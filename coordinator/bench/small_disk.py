"""A disk of its own for a measurement that fills it, where this user may mount one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNKS = (1 << 20, 4096)  # bytes that are taken at once, from large to a page


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[bool]:
    """Mounts a tmpfs of `nbytes` at `folder`, gone after the block; False where that is not permitted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # no such program
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(ballast: Path, leave: int) -> None:
    """Takes all of a disk's space but `leave` bytes, about, with the file `ballast`."""
    with ballast.open("wb") as file:
        end = 0
        for chunk in _CHUNKS:
            try:
                while True:
                    os.posix_fallocate(file.fileno(), end, chunk)
                    end += chunk
            except OSError:
                pass  # not so much is left
        os.ftruncate(file.fileno(), max(0, end - leave))
