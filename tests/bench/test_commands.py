"""`moehive bench …` as a person calls it, in small: it prints the figures that the documents name."""

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from moehive.coordinator.bench import experts, hop, hop_case, trunk, trunk_cases
from moehive.coordinator.cli.main import app
from moehive.coordinator.estimate.geometries import GEOMETRIES
from moehive.kernels.geometry import ExpertSpec, Format


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """A command turns them off for its process."""
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def rows_of(*arguments: str) -> list[dict[str, Any]]:
    return json.loads(printed(*arguments, "--json"))["rows"]


def test_experts_has_a_row_for_each_format_batch_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    small = experts.Shape("small", 256, 256)  # the smallest that each format has
    extent = experts.Extent(shapes=(small,), batches=(1, 3), set_bytes=1, read_bytes=1 << 20, repeats=1)
    monkeypatch.setattr(experts, "QUICK", extent)
    monkeypatch.setattr(experts, "_TORCH_SPINS", 0.0)
    rows = rows_of("experts", "--quick")
    threads = sorted({row["threads"] for row in rows})
    assert threads[0] == 1
    cases = [(row["format"], row["threads"], row["batch"]) for row in rows]
    assert cases == [(name, count, batch) for name in get_args(Format) for count in threads for batch in (1, 3)]
    for row in rows:
        assert row["kernel"] and row["shape"] == "small"
        spec = ExpertSpec(hidden_size=256, intermediate_size=256, activation="silu", format=row["format"])
        assert row["bytes"] == spec.nbytes * (8 if row["batch"] == 1 else 1)  # one token asks eight, three ask one
        assert min(row["seconds"], row["torch_seconds"], row["read_bandwidth"]) > 0
        assert row["bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["ratio"] == pytest.approx(row["bandwidth"] / row["read_bandwidth"])
    monkeypatch.setattr(experts, "measure_experts", lambda _: [experts.ExpertsRow(**row) for row in rows])
    table = printed("experts", "--quick")
    assert all(name in table for name in get_args(Format))


def test_the_shapes_are_those_that_are_named() -> None:
    assert [(shape.name, shape.hidden, shape.intermediate) for shape in experts.FULL.shapes] == [
        (name, GEOMETRIES[name].hidden, GEOMETRIES[name].intermediate) for name in ("qwen3.5-35b", "qwen3.5-397b")
    ]
    assert experts.QUICK.shapes == experts.FULL.shapes[:1]


def test_hop_has_its_rows_and_its_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hop_case, "PAYLOADS", (4096, 64 << 10))
    monkeypatch.setattr(hop_case, "CHUNK_BYTES", 128 << 10)
    monkeypatch.setattr(hop, "MOST_EXCHANGES", 5)
    found = json.loads(printed("hop", "--quick", "--json"))
    rows = found["rows"]
    asked = {"nodes", "payload_bytes", "tls", "p50_us", "p99_us", "raw_p50_us", "plain_p50_us", "plain_ratio"}
    assert all(asked <= row.keys() for row in rows)
    assert {row["nodes"] for row in rows} == {1, 4} and {row["tls"] for row in rows} == {True, False}
    assert {row["payload_bytes"] for row in rows} == {4096, 64 << 10, 128 << 10}
    for row in rows:
        assert 0 < row["p50_us"] <= row["p99_us"]
        if row["link"] == "loopback" or row["plain_p50_us"]:  # prefill over a slow link has no echoes beside it
            assert row["plain_ratio"] == pytest.approx(row["p50_us"] / row["plain_p50_us"])
    bare = next(row for row in rows if (row["nodes"], row["payload_bytes"], row["tls"]) == (1, 4096, False))
    assert found["summary"]["plain_ratio"] == bare["plain_ratio"]
    secure = next(row for row in rows if (row["nodes"], row["payload_bytes"], row["tls"]) == (1, 4096, True))
    added = found["summary"].pop("added_us_on_loopback")  # a difference of medians: noise may be more than that
    assert added == pytest.approx(secure["p50_us"] - secure["raw_p50_us"])
    assert isinstance(found["summary"].pop("added_us_on_slow_link"), float)
    assert min(found["summary"].values()) > 0


def test_trunk_has_a_row_for_each_shape_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    small = trunk_cases.SMALL | {"num_hidden_layers": 2}
    monkeypatch.setattr(trunk, "SMALL", small)
    monkeypatch.setattr(trunk_cases, "SMALL", small)
    monkeypatch.setattr(trunk_cases, "_REAL", {"real": ("qwen3_moe", small | {"hidden_size": 256, "head_dim": 64})})
    monkeypatch.setattr(trunk, "_READ_BYTES", 1 << 20)
    rows = rows_of("trunk", "--quick")
    cases = [(row["shape"], row["family"], row["format"]) for row in rows]
    real = [("real", "qwen3_moe", name) for name in trunk_cases._REAL_FORMATS[:3]]
    assert cases == [("64 wide", "mixtral", "f32"), *real]
    assert {"layer_us", "eager_us", "bytes", "bandwidth", "read_bandwidth", "ratio", "threads"} <= rows[0].keys()
    assert min(row["layer_us"] for row in rows) > 0
