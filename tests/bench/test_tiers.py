"""`moehive bench tiers` on a tiny model: its figures hang together, and the memory limit holds."""

from moehive.coordinator.bench import tiers
from moehive.coordinator.bench.memory_group import memory_group
from moehive.kernels.geometry import ExpertSpec


def test_a_tiny_run_stays_within_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(
        tiers, "SPEC", ExpertSpec(hidden_size=512, intermediate_size=256, activation="silu", format="q8_0")
    )
    monkeypatch.setattr(tiers, "EXPERTS", 16)
    monkeypatch.setattr(tiers, "TOP_K", 2)
    monkeypatch.setattr(tiers, "MARGINS", (0.3,))
    report = tiers.measure_tiers(quick=True, model=None, folder=tmp_path)
    assert [row.way for row in report.rows] == ["no prefetch", "prefetch", "prefetch, cache-aware 0.3"]
    for row in report.rows:
        assert 0 < row.hit_rate < 1 and row.decode_tokens_per_s > 0
        assert row.most_ram_bytes <= row.ram_bytes and row.killed == 0
        assert row.group_peak_bytes <= row.group_limit_bytes
    assert report.rows[0].foreseen_rate == 0 < report.rows[1].foreseen_rate
    assert report.rows[2].hit_rate > report.rows[1].hit_rate - 0.02
    assert all(0 < rate < 1 for rate in report.policies.values())
    assert list(tmp_path.iterdir()) == []


def test_a_group_is_gone_afterwards():
    with memory_group(64 << 20) as group:
        if group is None:
            return  # this user may make none
        assert group.folder.exists() and group.killed() == 0
    assert not group.folder.exists()
