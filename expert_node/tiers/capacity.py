"""What this machine can give in each tier, with head-room for what else runs on it."""

import shutil
from pathlib import Path

import psutil

HEAD_ROOM_BYTES = 1 << 30  # or a tenth of what is free, if that is more: for this process and the rest of the machine
DISK_SHARE = 0.8  # of what is free: the disk is somebody's
_UNLIMITED = 1 << 60  # what a control group without a limit says is larger


def memory_for_experts(available_bytes: int) -> int:
    """The default of --memory: what is free, less head-room."""
    return max(0, available_bytes - max(HEAD_ROOM_BYTES, available_bytes // 10))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM that this process can still take without swapping, within the limits of its control groups."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups(root)])


def disk_for_experts(folder: Path) -> int:
    """The default of --disk: most of what is free where the cache is, and what the cache takes already."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    cached = sum(path.stat().st_size for path in folder.glob("*/*.expert"))
    return int(DISK_SHARE * (shutil.disk_usage(existing).free + cached))


def _left_in_groups(root: Path) -> list[int]:
    """What each memory limit above this process leaves, of control groups version 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # not Linux
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = "memory.max", "memory.current", "inactive_file"
            base = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            base = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = base / path.lstrip("/")
        # In a container the path may be the host's, and the container's own group is mounted at the base.
        for folder in {base, group, *(p for p in group.parents if base in p.parents)}:
            left += _left(folder, *names)
    return left


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> list[int]:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max" or int(most) >= _UNLIMITED:
            return []
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [max(0, int(most) - used + int(stat.get(reclaimable, 0)))]
    except (OSError, ValueError):
        return []  # no such limit here
