"""What a node gives by default: head-room is left, and limits of control groups are kept."""

from pathlib import Path

import psutil

from moehive.expert_node.tiers import capacity


def test_memory_default_leaves_head_room():
    assert capacity.memory_for_experts(64 << 30) == (64 << 30) - (64 << 30) // 10
    assert capacity.memory_for_experts(4 << 30) == 3 << 30
    assert capacity.memory_for_experts(1 << 29) == 0


def test_this_machine():
    assert 0 < capacity.available_memory() <= psutil.virtual_memory().total


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_in_bytes", ".X").replace("__", ".").replace(".X", "_in_bytes")).write_text(text)


def test_limit_of_a_version_2_group(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/box\n")
    group = tmp_path / "sys/fs/cgroup/user/box"
    write(group, memory__max="max\n", memory__current="5\n", memory__stat="inactive_file 3\n")
    assert capacity.available_memory(tmp_path) == capacity.available_memory(tmp_path / "nowhere")
    # The group above has the limit: 1000 of which 400 are used, and 150 of those could be given back.
    write(group.parent, memory__max="1000\n", memory__current="400\n", memory__stat="anon 9\ninactive_file 150\n")
    assert capacity.available_memory(tmp_path) == 750
    write(group, memory__max="700\n", memory__current="650\n", memory__stat="inactive_file 0\n")
    assert capacity.available_memory(tmp_path) == 50
    write(group, memory__max="600\n")  # lowered below what is used
    assert capacity.available_memory(tmp_path) == 0


def test_limit_of_a_version_1_group_seen_from_a_container(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/docker/abc\n3:cpu:/\n0::/\n")
    write(
        tmp_path / "sys/fs/cgroup/memory",
        memory__limit_in_bytes="2000\n",
        memory__usage_in_bytes="500\n",
        memory__stat="total_inactive_file 100\n",
    )
    assert capacity.available_memory(tmp_path) == 1600


def test_disk_counts_what_the_cache_has(tmp_path):
    folder = tmp_path / "state/cache"
    before = capacity.disk_for_experts(folder)  # not made yet
    assert before > 0
    (folder / "model").mkdir(parents=True)
    (folder / "model/0-1.expert").write_bytes(bytes(1 << 20))
    assert capacity.disk_for_experts(folder) > 0
