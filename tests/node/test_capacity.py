"""What a node gives by default: head-room is left."""

from moehive.expert_node.tiers import capacity


def test_memory_default_leaves_head_room():
    assert capacity.memory_for_experts(64 << 30) == (64 << 30) - (64 << 30) // 10
    assert capacity.memory_for_experts(4 << 30) == 3 << 30
    assert capacity.memory_for_experts(1 << 29) == 0


def test_disk_counts_what_the_cache_has(tmp_path):
    folder = tmp_path / "state/cache"
    before = capacity.disk_for_experts(folder)  # not made yet
    assert before > 0
    (folder / "model").mkdir(parents=True)
    (folder / "model/0-1.expert").write_bytes(bytes(1 << 20))
    assert capacity.disk_for_experts(folder) > 0
