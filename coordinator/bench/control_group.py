"""A control group (cgroup, version 1 or 2) of a measurement's own, where this user may make one."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """A group below this process's own. A process enters it by writing to `folder`/cgroup.procs."""

    folder: Path
    version: int


@contextmanager
def control_group(
    controller: str, limits_v1: Mapping[str, str], limits_v2: Mapping[str, str]
) -> Iterator[ControlGroup | None]:
    """A new group with limits, each a file and what it says; None where there can be none.

    It is gone after the block; what still runs in it goes on in the group above.
    """
    made = _make(controller, {1: limits_v1, 2: limits_v2})
    try:
        yield made
    finally:
        if made is not None:
            for pid in (made.folder / "cgroup.procs").read_text().split():
                with suppress(OSError):  # it has just ended
                    (made.folder.parent / "cgroup.procs").write_text(pid)
            made.folder.rmdir()


def _make(controller: str, limits: Mapping[int, Mapping[str, str]]) -> ControlGroup | None:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = 1 if controller in controllers.split(",") else 2
        if controllers and version == 2:
            continue
        root = _ROOT / controller if version == 1 else _ROOT
        folder = root / path.lstrip("/") / f"moehive-bench-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            for name, text in limits[version].items():
                (folder / name).write_text(text)
            return ControlGroup(folder, version)
        except OSError:  # version 2 without the controller here
            folder.rmdir()
    return None
