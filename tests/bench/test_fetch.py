"""`moehive bench fetch` on four experts: what must hold whatever the machine's speed."""

import pytest

from moehive.coordinator.bench.fetch import SPEC, measure_fetch
from moehive.coordinator.bench.fetch_limits import tcp_copy


@pytest.mark.timeout(240)
def test_experts_leave_the_coordinator_once_and_a_restart_asks_nobody(tmp_path):
    rows = {row["row"]: row for row in measure_fetch(tmp_path, 4)}
    assert list(rows) == ["link", "loopback", "limit", "replicas", "restart"]
    limit = rows.pop("limit")
    assert all(value > 0 for name, value in limit.items() if name != "row")
    assert all(row["bytes"] == 4 * SPEC.nbytes and row["seconds"] > 0 for row in rows.values())
    assert rows["replicas"]["coordinator_bytes_sent"] == 4 * SPEC.nbytes and rows["replicas"]["ratio"] == 1
    assert rows["restart"]["coordinator_bytes_sent"] == 0
    assert 0 < rows["link"]["share"] <= 1.01  # the made-up link lets no more through
    assert list(tmp_path.glob("bench/*")) == []  # nothing is left behind


def test_the_plain_copy_copies():
    assert tcp_copy().bytes_per_s > 1e6
