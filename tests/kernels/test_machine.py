"""What is left of this machine's memory: limits of control groups count, for the coordinator as for a node."""

from functools import partial
from pathlib import Path

import psutil
import pytest

from moehive.coordinator import settings
from moehive.kernels.machine import available_memory


def test_this_machine() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def in_groups(root: Path, lines: str) -> None:
    """This process is in the control groups of these lines."""
    write(root / "proc/self", cgroup=lines)


def test_limit_of_a_version_2_group(tmp_path: Path) -> None:
    in_groups(tmp_path, "0::/user/box\n")
    group = tmp_path / "sys/fs/cgroup/user/box"
    write(group, memory__max="max\n", memory__current="5\n", memory__stat="inactive_file 3\n")
    assert available_memory(tmp_path) > 1 << 20  # no limit here
    # The group above has the limit: 1000 of which 400 are used, and 150 of those could be given back.
    write(group.parent, memory__max="1000\n", memory__current="400\n", memory__stat="anon 9\ninactive_file 150\n")
    assert available_memory(tmp_path) == 750
    write(group, memory__max="700\n", memory__current="650\n", memory__stat="inactive_file 0\n")
    assert available_memory(tmp_path) == 50
    write(group, memory__max="600\n")  # lowered below what is used
    assert available_memory(tmp_path) == 0


def test_limit_of_a_version_1_group_seen_from_a_container(tmp_path: Path) -> None:
    in_groups(tmp_path, "4:memory:/docker/abc\n3:cpu:/\n0::/\n")
    write(
        tmp_path / "sys/fs/cgroup/memory",
        memory__limit_in_bytes="2000\n",
        memory__usage_in_bytes="500\n",
        memory__stat="total_inactive_file 100\n",
    )
    assert available_memory(tmp_path) == 1600


def test_a_coordinator_keeps_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_groups(tmp_path, "0::/box\n")
    limit = {"memory__max": f"{96 << 20}\n", "memory__current": f"{32 << 20}\n", "memory__stat": "inactive_file 0\n"}
    write(tmp_path / "sys/fs/cgroup/box", **limit)
    monkeypatch.setattr(settings, "available_memory", partial(available_memory, tmp_path))
    made = settings.CoordinatorSettings(model="m")
    assert (made.fallback_bytes, made.kv_bytes) == (8 << 20, 16 << 20)
