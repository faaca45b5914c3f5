"""Files that somebody names or that a download holds: a pipe, a device or a socket in their place is refused."""

import stat
from pathlib import Path

from .types import CoordinatorError


def check_regular(path: Path) -> None:
    """Raises CoordinatorError for what may be read for ever, or waited for without a word; OSError.

    Directories are left to whoever opens them.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CoordinatorError(f"{path} is a pipe, a device or a socket; give a file.")
