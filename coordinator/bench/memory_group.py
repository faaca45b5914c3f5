"""A control group with a memory limit for a process that is measured, where this user may make one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A group below this process's own. A process enters it by writing to `folder`/cgroup.procs."""

    folder: Path
    version: int

    def peak_bytes(self) -> int:
        """The most memory that the group held, its page cache included."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        return int((self.folder / name).read_text())

    def killed(self) -> int:
        """How many processes were ended because the limit was reached."""
        name, key = ("memory.oom_control", "oom_kill") if self.version == 1 else ("memory.events", "oom_kill")
        lines = (line.split() for line in (self.folder / name).read_text().splitlines())
        return next((int(value) for found, value in lines if found == key), 0)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup | None]:
    """A new group with a limit, gone after the block, in which its processes end; None where there can be none."""
    made = _make(limit_bytes)
    try:
        yield made
    finally:
        if made is not None:
            made.folder.rmdir()


def _make(limit_bytes: int) -> MemoryGroup | None:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = 1 if "memory" in controllers.split(",") else 2
        if controllers and version == 2:
            continue
        folder = (_V1 if version == 1 else _V2) / path.lstrip("/") / f"moehive-bench-{os.getpid()}"
        limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(limit_bytes))
            return MemoryGroup(folder, version)
        except OSError:  # version 2 without the memory controller here
            folder.rmdir()
    return None
