"""Faults on a real cluster under load: no answer differs, no token is lost or repeated, nothing is left behind."""

import json
import os
import subprocess
import sys

SECONDS = 60


def test_a_storm_of_faults_changes_no_answer() -> None:
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "bench", "chaos", "--json", "--seed", "7"]
    ran = subprocess.run(
        [*command, "--minutes", str(SECONDS / 60)], capture_output=True, text=True, timeout=280, env=os.environ
    )
    assert ran.stdout, f"exit code {ran.returncode}: {ran.stderr}"
    report = json.loads(ran.stdout)
    assert report["requests"] >= 4 and report["faults"] >= 8, report
    assert (report["differ"], report["lost_or_repeated"], report["failed"]) == (0, 0, 0), report
    assert report["leaks"] == [] and ran.returncode == 0, report
