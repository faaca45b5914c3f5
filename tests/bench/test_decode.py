"""`moehive bench decode` on a real cluster: a layer of a real shape, over loopback and over a made-up link."""

import json
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "bench", "decode", "--state-dir", str(folder)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=250)


def test_a_link_costs_and_the_rest_adds_up(tmp_path):
    trace = tmp_path / "trace.json"
    model = ["--geometry", "qwen3-30b", "--layers", "2", "--experts", "8", "--format", "q8_0"]
    short = ["--prompt", "8", "--tokens", "4", "--rounds", "1", "--json"]
    done = run(tmp_path, *model, *short, "--nodes", "2", "--link", "20ms,1gbit", "--timeline", str(trace))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["nodes"] == 2 and row["link"] == "20 ms, 1 Gbit/s"
    assert row["token_ms"] > 2 * 2 * 20  # two layers, there and back; both nodes at once
    assert row["hop_share"] > 0.5
    # Eight experts of three 768 x 2048 matrices in each of two layers; the layout may pad rows.
    assert row["expert_bytes"] >= 2 * 8 * 3 * 768 * 2048 * 34 // 32
    assert row["node_slice_bytes"] * 2 >= row["expert_bytes"]  # all eight are hit, and there are two nodes
    assert row["node_peak_bytes"] > row["node_slice_bytes"]
    assert row["limit_share"] == row["decode_tokens_per_s"] / row["limit_tokens_per_s"]
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"wait", "round trip"} <= {event["name"] for event in events}


def test_wrong_options_are_sentences(tmp_path):
    for options, sentence in (
        ([], "either --geometry or --model"),
        (["--geometry", "qwen3-30b", "--link", "fast"], "not a link"),
        (["--geometry", "qwen9"], "known are"),
    ):
        done = run(tmp_path, *options)
        assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
