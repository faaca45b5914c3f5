"""`moehive bench decode` on a real cluster: a layer of a real shape, over loopback and over a made-up link."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "bench", "decode", "--state-dir", str(folder)]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=250)


def covered(outer, spans):
    """The time of a pass that is in one of its own spans, microseconds."""
    begin = outer["ts"]
    end = begin + outer["dur"]
    mine = [s for s in spans if (s["pid"], s["tid"]) == (outer["pid"], outer["tid"]) and s is not outer]
    total, until = 0.0, begin
    for span in sorted((s for s in mine if begin <= s["ts"] < end), key=lambda s: s["ts"]):
        here = min(span["ts"] + span["dur"], end)
        total += max(0.0, here - max(span["ts"], until))
        until = max(until, here)
    return total


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
    spans = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {"sending", "waiting", "reading", "adding up"} <= {span["name"] for span in spans if span["pid"] == 1}
    passes = [span for span in spans if span["name"] == "1 sequences, 1 tokens"]
    assert len(passes) == 3 and min(covered(one, spans) / one["dur"] for one in passes) > 0.9
    waiting, working = ([s for s in spans if (s["name"] == "waiting") is so] for so in (True, False))
    # Of what the coordinator does itself, too; in one of them, as it may lose its processor between two spans.
    assert max(covered(one, working) / (one["dur"] - covered(one, waiting)) for one in passes) > 0.75
    trips = [span for span in spans if span["name"] == "round trip"]
    assert len(trips) == 2 * 2 * 4  # nodes, layers, passes: the prompt's and three of a token
    for trip in trips:
        begin, end = trip["ts"], trip["ts"] + trip["dur"]
        mine = [s for s in spans if s["pid"] == trip["pid"] and s is not trip and begin <= s["ts"] < end]
        assert {s["args"]["layer"] for s in mine} == {trip["args"]["layer"]}
        assert sum(s["dur"] for s in mine) == pytest.approx(trip["dur"], abs=0.01)
        assert {"link", "reading", "experts"} <= {s["name"] for s in mine}
        # Each way takes 20 ms, and the node's clock is this machine's.
        (experts,) = (s for s in mine if s["name"] == "experts")
        assert min(mine, key=lambda s: s["ts"])["dur"] > 20_000
        assert end - experts["ts"] - experts["dur"] > 20_000
    writing = [span for span in spans if span["name"] == "writing"]
    assert len(writing) == len(trips) - 2  # but each node's last


def test_a_file_of_llama_cpp_is_measured(tmp_path):
    """A Mixtral of 2.3 MB that llama.cpp wrote and quantized, its experts in two formats."""
    archive = Path(__file__).parents[1] / "checkpoints" / "llama_cpp" / "mixtral.tar.xz"
    with tarfile.open(archive) as packed:
        packed.extract("Q4_K_M.gguf", tmp_path, filter="data")
    file = tmp_path / "Q4_K_M.gguf"
    short = ["--nodes", "3", "--prompt", "5", "--tokens", "3", "--rounds", "1"]
    done = run(tmp_path / "state", "--model", str(file), *short, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["model"], row["nodes"], row["link"]) == ("Q4_K_M", 3, "loopback")
    assert (row["prompt_tokens"], row["tokens"]) == (5, 3)
    assert min(row["prefill_tokens_per_s"], row["decode_tokens_per_s"], row["experts_ms"]) > 0
    assert row["expert_bytes"] + row["trunk_bytes"] < file.stat().st_size  # not all experts are read for a token
    limit = row["read_bandwidth"] / (row["expert_bytes"] + row["trunk_bytes"])
    assert row["limit_tokens_per_s"] == pytest.approx(limit)


def test_several_sequences_at_once(tmp_path):
    model = ["--geometry", "qwen3-30b", "--layers", "1", "--experts", "8"]
    short = ["--prompt", "4", "--tokens", "12", "--rounds", "1", "--json"]
    done = run(tmp_path, *model, *short, "--sequences", "3")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["sequences"] == 3 and 0 <= row["micro_batches_share"] <= 1
    assert row["decode_tokens_per_s"] == pytest.approx(3e3 / row["token_ms"])


def test_a_layer_of_each_kind_of_qwen3_5(tmp_path):
    """Three layers with a recurrent state and one with attention, in the width of the 35B."""
    model = ["--geometry", "qwen3.5-35b", "--layers", "4", "--experts", "8", "--format", "q4_0"]
    done = run(tmp_path, *model, "--prompt", "4", "--tokens", "3", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["expert_bytes"] >= 4 * 8 * 3 * 512 * 2048 * 18 // 32
    # All of a token's time, and once more what nodes compute while the coordinator does.
    assert row["trunk_share"] + row["experts_share"] + row["hop_share"] > 0.999
    assert 0 < row["waiting_share"] < 1


@pytest.mark.parametrize(("format", "bits"), [("fp8_block", 8), ("int4_g64", 4), ("mxfp4", 4)])
def test_formats_of_safetensors(tmp_path, format, bits):
    model = ["--geometry", "qwen3-30b", "--layers", "1", "--experts", "8", "--format", format]
    done = run(tmp_path, *model, "--prompt", "4", "--tokens", "3", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    weights = 8 * 3 * 768 * 2048
    assert weights * bits // 8 < row["expert_bytes"] < weights * (bits + 1) // 8
    attention, head = 2048 * (2 * 4096 + 2 * 512), 4096 * 2048 * 2
    assert attention * bits // 8 < row["trunk_bytes"] - head < attention * (bits + 1) // 8 + 2**20


def test_the_table_has_the_figures(tmp_path):
    """A layer of Qwen3.5-397B's width, without --json."""
    model = ["--geometry", "qwen3.5-397b", "--layers", "1", "--experts", "10"]
    threads = ["--nodes", "1", "--threads-per-node", "2", "--trunk-threads", "1"]
    done = run(tmp_path, *model, *threads, "--prompt", "2", "--tokens", "2", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    figures = {}
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")]
        if len(cells) == 2:
            figures[cells[0]] = cells[1]
    assert figures["nodes"] == "1" and figures["threads per node"] == "2" and figures["link"] == "loopback"
    number, unit = figures["expert bytes"].split()
    assert float(number) == pytest.approx(10 * 3 * 4096 * 1024 * 18 / 32 / 1e6, abs=0.05) and unit == "MB"
    assert figures["read bandwidth"].endswith(" GB/s") and float(figures["read bandwidth"].split()[0]) > 0
    shares = ("trunk share", "experts share", "hop share", "waiting share", "limit share")
    assert all(figures[name].endswith("%") and 0 <= int(figures[name][:-1]) <= 200 for name in shares)
    assert float(figures["decode tokens per s"]) == pytest.approx(1e3 / float(figures["token ms"]), rel=2e-3)


def test_wrong_options_are_sentences(tmp_path):
    for options, sentence in (
        ([], "either --geometry or --model"),
        (["--geometry", "qwen3-30b", "--link", "fast"], "not a link"),
        (["--geometry", "qwen9"], "known are"),
    ):
        done = run(tmp_path, *options)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
