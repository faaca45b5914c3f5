"""What this machine has: its processors, and the memory that is left for weights."""

import os
from pathlib import Path

import psutil

_UNLIMITED = 1 << 60  # what a control group without a limit says is larger


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM that this process can still take without swapping, within the limits of its control groups.

    `root`: where /proc and /sys/fs/cgroup are looked for.
    """
    return min([int(psutil.virtual_memory().available), *_left_in_groups(root)])


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
