"""`moehive bench fetch` on four experts: what must hold whatever the machine's speed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moehive.coordinator.bench.fetch import measure_fetch
from moehive.coordinator.bench.fetch_cluster import SPEC, FetchModel
from moehive.coordinator.bench.fetch_limits import tcp_copy
from moehive.coordinator.bench.fetch_link import over_a_link
from moehive.coordinator.bench.kernel_link import queue_command, shaper
from moehive.coordinator.bench.slow_link import LinkSpeed

NO_SHAPER = "this user may make no network namespaces, or the kernel has no queue that shapes"


@pytest.mark.timeout(240)
def test_experts_leave_the_coordinator_once_and_a_restart_asks_nobody(tmp_path: Path) -> None:
    interfaces = Path("/proc/net/dev").read_text().count("\n")
    rows = {row["row"]: row for row in measure_fetch(tmp_path, 4)}
    assert list(rows) == ["link", "loopback", "limit", "replicas", "restart"]
    limit = rows.pop("limit")
    assert all(value > 0 for name, value in limit.items() if name != "row")
    assert all(row["bytes"] == 4 * SPEC.nbytes and row["seconds"] > 0 for row in rows.values())
    assert rows["replicas"]["coordinator_bytes_sent"] == 4 * SPEC.nbytes and rows["replicas"]["ratio"] == 1
    assert rows["restart"]["coordinator_bytes_sent"] == 0
    assert 0 < rows["link"]["share"] <= 1.01  # the made-up link lets no more through
    assert rows["link"]["made_by"] == str(shaper() or "proxy")
    assert Path("/proc/net/dev").read_text().count("\n") == interfaces
    assert list(tmp_path.glob("bench/*")) == []  # nothing is left behind


def test_a_user_without_namespaces_gets_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # nor the tools
    shaper.cache_clear()
    try:
        row = asyncio.run(over_a_link(tmp_path / "link", FetchModel(4)))
    finally:
        shaper.cache_clear()
    assert row["made_by"] == "proxy" and 0 < row["share"] <= 1.01


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", ["interrupted", "left alone"])
def test_a_link_is_gone_when_who_wanted_it_is(how: str, tmp_path: Path) -> None:
    found = shaper()
    if found is None:
        pytest.skip(NO_SHAPER)
    words = [sys.executable, "-m", "moehive.coordinator.bench.fetch_link", str(tmp_path / "link"), "24", found.queue]
    process = subprocess.Popen(
        [*found.prefix, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    while not (tmp_path / "link" / "node-1.log").exists():
        assert process.poll() is None
        time.sleep(0.05)
    if how == "interrupted":
        process.send_signal(signal.SIGINT)
    else:
        process.stdin.close()
    assert process.wait() == 0
    with pytest.raises(ProcessLookupError):  # the node and the far namespace's process, too
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("queue", ["netem", "tbf"])
def test_the_kernel_knows_the_queue_or_says_that_it_does_not(queue: str) -> None:
    """Where a queue is lacking its command is still one that `tc` understands."""
    found = shaper()
    if found is None:
        pytest.skip(NO_SHAPER)
    words = queue_command(queue, "near", LinkSpeed(0.00025, 1e9))
    script = f"ip link add near type veth peer name far && {' '.join(words)} && tc qdisc show dev near"
    done = subprocess.run([*found.prefix, "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 0:
        assert f"qdisc {queue}" in done.stdout and "rate 1Gbit" in done.stdout
    else:
        assert queue != found.queue and "qdisc kind is unknown" in done.stderr


def test_the_plain_copy_copies() -> None:
    assert tcp_copy().bytes_per_s > 1e6
