"""One large file from a hub into its cache: goes on where it was cut, and counts only once its hash is right.

The hub's own client begins a file anew after a cut, which costs hours with files of tens of gigabytes. The file is
put where that client expects it (blobs/ and the hash), so that it takes it as its own.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status

from ..types import CoordinatorError
from .hub_files import HubFile

_ATTEMPTS = 5  # in a row that bring nothing new
_PARTIAL, _RANGE_WRONG = 206, 416


class Unreachable(Exception):
    """The download broke off, again and again."""


def fetch_blob(url: str, folder: Path, file: HubFile, progress: Callable[[int], None]) -> None:
    """Downloads `file` from `url` into `folder`/its SHA-256; `progress` is told the bytes that are here.

    Raises Unreachable, CoordinatorError for contents of another hash or size, OSError for the disk, and the hub's
    RepositoryNotFoundError when this user may not have the file.
    """
    done = folder / str(file.sha256)
    part = folder / f"{file.sha256}.moehive.part"
    with part.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CoordinatorError(f"{file.name} is being downloaded by another process; wait for it.") from error
        for whole in (False, True):  # a part that turns out wrong is fetched once more from its beginning
            if whole:
                out.truncate(0)
            _fill(url, out, file, progress)
            if _sha256(part) == file.sha256:
                os.fsync(out.fileno())
                part.rename(done)
                return
        part.unlink()
    raise CoordinatorError(
        f"The hub sends {file.name} with another hash than it says, twice; the file is damaged there or on the way."
    )


def _fill(url: str, out: BinaryIO, file: HubFile, progress: Callable[[int], None]) -> None:
    """Appends to `out` until it has all bytes. Raises Unreachable, RepositoryNotFoundError."""
    failures = 0
    while (have := os.fstat(out.fileno()).st_size) < file.size:
        try:
            _append(url, out, file.size, progress)
            reason = "the connection ended"
        except RepositoryNotFoundError:  # gated, or private: asking again does not help
            raise
        except HfHubHTTPError as error:  # an OSError, but not of the disk
            reason = str(error).strip()
        except OSError:
            raise
        except Exception as error:  # httpx's many ways of a broken connection
            if not type(error).__module__.startswith(("httpx", "httpcore")):
                raise
            reason = str(error) or type(error).__name__
        out.flush()
        failures = 0 if os.fstat(out.fileno()).st_size > have else failures + 1
        if failures >= _ATTEMPTS:
            raise Unreachable(reason.splitlines()[0])
    if os.fstat(out.fileno()).st_size > file.size:
        out.truncate(0)
        raise CoordinatorError(f"The part of {file.name} that was here is longer than the file; run it again.")


def _append(url: str, out: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
    have = os.fstat(out.fileno()).st_size
    headers = build_hf_headers() | {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as reply:
        if reply.status_code == _RANGE_WRONG or (have and reply.status_code != _PARTIAL):
            out.truncate(0)  # a server that does not resume
            have = 0
            if reply.status_code == _RANGE_WRONG:
                return
        hf_raise_for_status(reply)
        for piece in reply.iter_bytes():
            if have + len(piece) > size:
                raise CoordinatorError(f"The hub sends more than the {size} bytes that it says for {url}.")
            out.write(piece)
            have += len(piece)
            progress(have)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
