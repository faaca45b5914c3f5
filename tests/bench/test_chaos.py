"""Faults on a real cluster under load: no answer differs, no token is lost or repeated, nothing is left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moehive.coordinator.bench.chaos_report import ChaosReport
from moehive.coordinator.bench.process_cluster import Supervised

SECONDS = 60
# A program that runs until it is killed, or crashes when its file is gone.
PART = """
import faulthandler, os, signal, sys
faulthandler.enable()
while os.path.exists(sys.argv[1]):
    signal.pause()
os.abort()
"""


@pytest.mark.timeout(600)  # a busy machine starts processes slowly
def test_a_storm_of_faults_changes_no_answer() -> None:
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "bench", "chaos", "--json", "--seed", "449"]
    ran = subprocess.run(
        [*command, "--minutes", str(SECONDS / 60)], capture_output=True, text=True, timeout=560, env=os.environ
    )
    assert ran.stdout, f"exit code {ran.returncode}: {ran.stderr}"
    report = json.loads(ran.stdout)
    assert report["requests"] >= 4 and report["faults"] >= 3, report
    assert report["by_kind"]["coordinator"] >= 1, report  # the first fault of this seed
    assert (report["differ"], report["lost_or_repeated"], report["failed"], report["crashes"]) == (0, 0, 0, 0), report
    assert report["leaks"] == [] and ran.returncode == 0, report


def test_a_difference_is_found_at_its_token() -> None:
    report = ChaosReport(1, 1.0)
    report.answered("prompt 1", [1, 2, 3], [1, 2, 3])
    assert report.passed
    report.answered("prompt 2", [1, 9, 3], [1, 2, 3])
    report.answered("prompt 3", [1, 2, 2, 3], [1, 2, 3])
    assert (report.differ, report.lost_or_repeated, report.passed) == (1, 1, False)
    assert report.errors == ["prompt 2: token 1 is 9 instead of 2.", "prompt 3: 4 tokens came instead of 3."]


def test_a_process_that_ends_by_itself_is_reported_and_one_that_was_killed_is_not(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(PART)

    async def run() -> tuple[list[str], int]:
        fine = tmp_path / "fine"
        fine.touch()
        prelude = f"sys.path.insert(0, {str(tmp_path)!r})"
        part = Supervised("part", ["part", str(fine)], tmp_path / "log", prelude=prelude)
        part.start()
        await part.restart()
        await part.restart()
        assert part.crashes == []
        fine.unlink()
        await part.restart()
        while not part.crashes:  # noqa: ASYNC110 - there is nothing to await
            await asyncio.sleep(0.05)
        await part.stop()
        return part.crashes, part.kills

    crashes, kills = asyncio.run(run())
    assert kills == 2
    assert f"exit code {-signal.SIGABRT}" in crashes[0] and "Current thread" in crashes[0]
