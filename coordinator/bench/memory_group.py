"""A control group with a memory limit for a process that is measured, where this user may make one."""

from collections.abc import Iterator
from contextlib import contextmanager

from .control_group import ControlGroup, control_group


class MemoryGroup(ControlGroup):
    """What a group's memory limit came to."""

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
    limit = str(limit_bytes)
    with control_group("memory", {"memory.limit_in_bytes": limit}, {"memory.max": limit}) as group:
        yield None if group is None else MemoryGroup(group.folder, group.version)
