"""The hash of a part of a file."""

import os
from pathlib import Path

from moehive.kernels.digest import Digest, new_digest

from ...types import CoordinatorError

_PIECE = 4 << 20  # bytes read at once


def hashed(path: Path, begin: int, nbytes: int, digest: Digest | None = None) -> bytes:
    """The hash of some bytes of a file by `digest`, which is new; of no bytes at all if the file ends before them.

    Raises CoordinatorError for a file that can't be read.
    """
    digest = digest or new_digest()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while nbytes:
                piece = os.pread(descriptor, min(nbytes, _PIECE), begin)
                if not piece:
                    return b""
                digest.update(piece)
                begin, nbytes = begin + len(piece), nbytes - len(piece)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CoordinatorError(f"{path} can't be read: {error.strerror}.") from error
    return digest.digest()
