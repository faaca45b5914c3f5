"""`moehive trace` and `moehive plan` over files, as a person uses them."""

import asyncio
import json

import numpy as np
from typer.testing import CliRunner

from moehive.coordinator.cli.main import app
from moehive.coordinator.dispatch.statistics import Pass, passing
from moehive.coordinator.placement import search
from moehive.coordinator.placement.traces import read_trace
from moehive.coordinator.traffic import Traffic, statistics_path
from moehive.kernels.geometry import ExpertSpec, LayerGeometry, Manifest

SPEC = ExpertSpec(hidden_size=64, intermediate_size=32, activation="silu", format="bf16")
MANIFEST = Manifest("tiny", "ab" * 32, (LayerGeometry(8, 2, SPEC),) * 2)


def traffic_of(folder, tokens):
    """A coordinator's statistics after `tokens` tokens."""

    async def run():
        traffic = Traffic(statistics_path(folder, MANIFEST), MANIFEST)
        traffic.start()
        random = np.random.default_rng(0)
        for token in range(tokens):
            passing.set(Pass([(token // 10, 1)]))
            for layer in range(2):
                traffic.statistics.note(layer, random.permutation(8)[None, :2])
        await traffic.stop()
        return traffic

    return asyncio.run(run())


def test_what_was_recorded_is_exported_and_planned_for(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "MOVES", 2000)
    traffic_of(tmp_path, 300)
    out = tmp_path / "t.npz"
    result = CliRunner().invoke(app, ["trace", "--state-dir", str(tmp_path), "--export", str(out)])
    assert result.exit_code == 0, result.output
    trace = read_trace(out)
    assert trace.experts.shape == (2, 300, 2) and len(np.unique(trace.seq)) == 30

    nodes = [{"name": name, "mem_bytes": 12 * SPEC.nbytes, "bw_Bps": 1e9, "rtt_s": 1e-4, "msg_s": 0} for name in "ab"]
    (tmp_path / "c.json").write_text(json.dumps({"nodes": nodes, "expert_bytes": SPEC.nbytes}))
    arguments = ["plan", "--trace", str(out), "--cluster", str(tmp_path / "c.json"), "--json", "--explain"]
    result = CliRunner().invoke(app, [*arguments, "--batch", "1,4", "-o", str(tmp_path / "p.json")])
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "p.json").read_text())
    assert [len(layer["replicas"]) for layer in plan["layers"]] == [8, 8]
    assert all(nodes and set(nodes) <= {0, 1} for layer in plan["layers"] for nodes in layer["replicas"])
    assert 0 < plan["bound_s"] <= plan["expected_s"]
    words = json.loads(result.stdout)["explanation"]
    assert "holds" in words["nodes"]["a"] and "waits most for" in words["waits"]
    assert words["more"] and all("machine" in sentence or "node" in sentence for sentence in words["more"])


def test_the_next_start_goes_on_from_what_was_recorded(tmp_path):
    assert traffic_of(tmp_path, 50).statistics.tokens == 50
    again = traffic_of(tmp_path, 30)
    assert again.statistics.tokens == 80 and again.statistics.trace()[0].shape == (2, 80, 2)
    statistics_path(tmp_path, MANIFEST).write_bytes(b"damaged")
    assert traffic_of(tmp_path, 3).statistics.tokens == 3


def test_nothing_recorded_is_said(tmp_path):
    result = CliRunner().invoke(app, ["trace", "--state-dir", str(tmp_path), "--export", str(tmp_path / "t.npz")])
    assert result.exit_code == 1 and "has recorded anything" in str(result.exception)
