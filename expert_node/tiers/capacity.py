"""What this machine can give in each tier, with head-room for what else runs on it."""

import shutil
from pathlib import Path

HEAD_ROOM_BYTES = 1 << 30  # or a tenth of what is free, if that is more: for this process and the rest of the machine
DISK_SHARE = 0.8  # of what is free: the disk is somebody's


def memory_for_experts(available_bytes: int) -> int:
    """The default of --memory: what is free, less head-room."""
    return max(0, available_bytes - max(HEAD_ROOM_BYTES, available_bytes // 10))


def disk_for_experts(folder: Path) -> int:
    """The default of --disk: most of what is free where the cache is, and what the cache takes already."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    cached = sum(path.stat().st_size for path in folder.glob("*/*.expert"))
    return int(DISK_SHARE * (shutil.disk_usage(existing).free + cached))
