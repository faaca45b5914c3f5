"""`moehive convert --budget`: a pack whose experts and trunk differ in their formats, and keeps within its bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moehive.coordinator.bench import budget
from moehive.coordinator.checkpoints.inventory import look
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.checkpoint import PackCheckpoint
from moehive.coordinator.checkpoints.pack.verify import verify
from moehive.coordinator.cli.packs import budget_bytes
from moehive.coordinator.estimate.cluster import Cluster, Machine, Tier, write_cluster
from moehive.coordinator.estimate.constants import CONTEXT_TOKENS, COORDINATOR_BYTES
from moehive.coordinator.estimate.headers import of_files
from moehive.coordinator.serving.text import Text
from moehive.coordinator.trunk import load_trunk


def run(*arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_formats_are_chosen_for_the_bytes(chat_model: Path, tmp_path: Path) -> None:
    source = open_model(str(chat_model))
    size = sum(path.stat().st_size for path in chat_model.glob("*.safetensors"))
    limit = size // 3
    pack, text = tmp_path / "pack", tmp_path / "text.txt"
    text.write_text("The harbour lies open to the west, and the fishermen watch the sky. " * 40)
    done = run("convert", chat_model, pack, "--budget", limit, "--calibration", text, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    trunk = sum((pack / "trunk" / name).stat().st_size for name in ("model.safetensors", "matrices.bin"))
    assert limit // 2 < made["expert_bytes"] + trunk <= limit + 8192  # headers and padding come on top
    assert made["expert_bytes"] < source.manifest.total_bytes
    opened = open_model(str(pack))
    assert isinstance(opened, PackCheckpoint)
    formats = {pair for layer in opened.manifest.layers for pair in layer.formats}
    assert len(formats | {matrix.format for matrix in opened.pack.matrices}) > 1
    assert opened.pack.matrices
    read = load_trunk(opened, 1)  # in those formats
    assert read.vocab_size == load_trunk(source, 1).vocab_size
    assert look("pack", pack).trunk_bytes == of_files(str(pack)).trunk_bytes < trunk
    taken = {fmt for pair in formats for fmt in pair}
    assert set(look("pack", pack).formats) == taken != set(look("source", chat_model).formats)
    assert verify(pack, 1, lambda *_: None).damaged == ()


def test_a_cluster_is_a_budget(chat_model: Path, tmp_path: Path) -> None:
    """Its RAM, less what the program and the cache take, and one expert; a GPU's memory is no room."""
    model = of_files(str(chat_model))
    beside = model.kv_bytes_a_token * CONTEXT_TOKENS + COORDINATOR_BYTES + model.layers[0].spec.nbytes
    ram = Tier(123_456 + beside, 1e10)
    machine = Machine("one", coordinator=True, vram=Tier(10**9, 1e12), ram=ram)
    write_cluster(tmp_path / "cluster.toml", Cluster(0.0, 1e9, (machine,)))
    assert budget_bytes(str(chat_model), "cluster", tmp_path / "cluster.toml") == 123_456
    assert budget_bytes(str(chat_model), "120GB", None) == 120 * 10**9


def test_the_benchmark_shows_divergence_and_text(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def short(words: Text, _: None) -> list[torch.Tensor]:
        return [torch.tensor(await words.encode("The harbour lies open to the west. " * 36))]

    monkeypatch.setattr(budget, "calibration_texts", short)
    rows = budget.measure_budgets(str(chat_model), tmp_path, 1, lambda *_: None)
    assert [row.bits for row in rows] == [3.5, 4.5]  # 128 columns fill half a block, so q2_k takes 3.5
    for row in rows:
        assert row.chosen_bits <= row.bits and row.uniform_bits <= row.bits
        assert row.ratio == row.chosen_kl / row.uniform_kl < 1
        assert row.exact_text and row.uniform_text and row.chosen_text


def test_a_budget_that_is_too_small_is_one_sentence(chat_model: Path, tmp_path: Path) -> None:
    done = run("convert", chat_model, tmp_path / "pack", "--budget", "100KB")
    assert done.returncode == 1
    assert "at least" in done.stderr and "Traceback" not in done.stderr
