"""The room that a pack takes on its disk, so that one which is too small is refused before anything is written."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from moehive.kernels.geometry import Manifest

from ...sizes import in_bytes
from ...types import CoordinatorError
from ..checkpoint import Checkpoint
from ..gguf.checkpoint import GgufCheckpoint
from .manifest import TRUNK, offsets
from .matrices import TrunkMatrix
from .trunk import trunk_bytes


def bytes_left(
    folder: Path, target: Manifest, trunk: Checkpoint | GgufCheckpoint, matrices: Sequence[TrunkMatrix]
) -> int:
    """Bytes that `folder`, which need not be there yet, still takes of its disk to be a pack of `target`.

    `trunk`: what the trunk is copied of, but for `matrices`. Raises OSError.
    """
    whole = sum(offsets(layer)[-1] for layer in target.layers)
    # A file's size says where its last expert lies, its blocks how much of it is there.
    written = sum(file.stat().st_blocks * 512 for file in folder.glob("experts-*.bin"))
    return max(0, whole - written) + (0 if (folder / TRUNK).exists() else trunk_bytes(trunk, matrices))


def check_room(folder: Path, nbytes: int) -> None:
    """Raises CoordinatorError if the disk of `folder` has not `nbytes` left, OSError."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise CoordinatorError(
            f"{folder} takes {in_bytes(nbytes)} more, and its disk has {in_bytes(free)} left: free some space, or"
            " name a directory on another disk, and run the same command again."
        )
