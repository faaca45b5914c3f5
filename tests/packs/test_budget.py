"""`moehive convert --budget`: a pack whose experts and trunk differ in their formats, and keeps within its bytes."""

import json
import subprocess
import sys
from pathlib import Path

from moehive.coordinator.checkpoints.inventory import look
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.checkpoint import PackCheckpoint
from moehive.coordinator.checkpoints.pack.verify import verify
from moehive.coordinator.estimate.headers import of_files
from moehive.coordinator.trunk import load_trunk


def run(*arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_formats_are_chosen_for_the_bytes(chat_model: Path, tmp_path: Path) -> None:
    source = open_model(str(chat_model))
    size = sum(path.stat().st_size for path in chat_model.glob("*.safetensors"))
    budget = size // 3
    pack, text = tmp_path / "pack", tmp_path / "text.txt"
    text.write_text("The harbour lies open to the west, and the fishermen watch the sky. " * 40)
    done = run(chat_model, pack, "--budget", budget, "--calibration", text, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    trunk = sum((pack / "trunk" / name).stat().st_size for name in ("model.safetensors", "matrices.bin"))
    assert budget // 2 < made["expert_bytes"] + trunk <= budget + 8192  # headers and padding come on top
    assert made["expert_bytes"] < source.manifest.total_bytes
    opened = open_model(str(pack))
    assert isinstance(opened, PackCheckpoint)
    formats = {pair for layer in opened.manifest.layers for pair in layer.formats}
    assert len(formats | {matrix.format for matrix in opened.pack.matrices}) > 1
    assert opened.pack.matrices
    read = load_trunk(opened, 1)  # in those formats
    assert read.vocab_size == load_trunk(source, 1).vocab_size
    assert look("pack", pack).trunk_bytes == of_files(str(pack)).trunk_bytes < trunk
    assert verify(pack, 1, lambda *_: None).damaged == ()


def test_a_budget_that_is_too_small_is_one_sentence(chat_model: Path, tmp_path: Path) -> None:
    done = run(chat_model, tmp_path / "pack", "--budget", "100KB")
    assert done.returncode == 1
    assert "at least" in done.stderr and "Traceback" not in done.stderr
