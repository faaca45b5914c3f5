"""`moehive bench tiers` on a small model: its figures hang together, and the memory limit holds."""

from contextlib import nullcontext

import pytest

from moehive.coordinator.bench import tiers
from moehive.coordinator.bench.memory_group import memory_group
from moehive.kernels.geometry import ExpertSpec


@pytest.mark.parametrize("grouped", [True, False], ids=["in a group if one can be made", "without"])
def test_a_small_run_stays_within_its_memory(grouped, tmp_path, monkeypatch):
    spec = ExpertSpec(hidden_size=2048, intermediate_size=1024, activation="silu", format="q8_0")
    monkeypatch.setattr(tiers, "SPEC", spec)
    monkeypatch.setattr(tiers, "EXPERTS", 16)
    monkeypatch.setattr(tiers, "TOP_K", 2)
    monkeypatch.setattr(tiers, "MARGINS", (0.3,) if grouped else ())
    if not grouped:
        monkeypatch.setattr(tiers, "memory_group", lambda _: nullcontext(None))
    report = tiers.measure_tiers(quick=True, model=None, folder=tmp_path)
    ways = ["no prefetch", "prefetch", "prefetch, cache-aware 0.3"]
    assert [row.way for row in report.rows] == ways[: len(report.rows)]
    for row in report.rows:
        # Were all experts in memory, twice the allowance, the process would be beyond its limit, in a group or not.
        assert row.process_bytes + row.ram_bytes > row.process_limit_bytes
        assert row.ram_bytes < row.process_bytes <= row.process_limit_bytes
        assert 0 < row.hit_rate < 1 and row.decode_tokens_per_s > 0
        assert row.most_ram_bytes <= row.ram_bytes and row.killed == 0
        assert row.group_limit_bytes in (0, row.process_limit_bytes)
        if row.group_limit_bytes:
            assert row.ram_bytes < row.group_peak_bytes <= row.group_limit_bytes
    assert report.rows[0].foreseen_rate == 0 < report.rows[1].foreseen_rate
    if grouped:
        assert report.rows[2].hit_rate > report.rows[1].hit_rate - 0.02
    assert all(0 < rate < 1 for rate in report.policies.values())
    assert list(tmp_path.iterdir()) == []


def test_a_group_is_gone_afterwards():
    with memory_group(64 << 20) as group:
        if group is None:
            return  # this user may make none
        assert group.folder.exists() and group.killed() == 0
    assert not group.folder.exists()
