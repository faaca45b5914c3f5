"""`moehive bench faults --quick`: every part runs, and no fault changes a text."""

import json
import subprocess
import sys


def test_each_fault_is_measured_and_changes_no_text() -> None:
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "bench", "faults", "--quick", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert (report["differ"], report["failed"]) == (0, 0) and report["texts"] > 4, report
    rows = report["rows"]
    for word in ("replan", "without replicas", "with replicas", "noticed", "quarter of a core"):
        assert any(word in row["what"] for row in rows), word
    for row in rows:
        (figure,) = (row[name] for name in ("seconds", "ratio") if name in row)
        assert 0 < figure <= row["worst"] and row["times"] == 1
        assert row["met"] is (None if row["goal"] is None else row["worst"] <= row["goal"])
