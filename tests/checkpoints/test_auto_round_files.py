"""Checkpoints that auto-round wrote in the formats of four projects (auto_round/make.py), and what it says itself."""

import json
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk

# Directory of the archive → the format that experts and trunk are computed in.
FORMATS = {
    "auto_round": "int4_g128", "auto_gptq": "int4_g64", "asymmetric": "int4_g128", "auto_awq": "int4_g128",
    "int4": "int4_g32", "int8": "q8_0", "fp8": "fp8_block",
}  # fmt: skip
TOKENS = [3, 17, 5, 99, 42, 8, 61, 7, 30, 77, 12, 110]
DIVERGENCE = 1e-3  # nats a token: inputs are rounded to 8 bits here and to f16 there; a wrong row costs 0.1 and more


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto_round")
    with tarfile.open(Path(__file__).with_name("auto_round") / "auto_round.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", list(FORMATS))
def test_it_says_what_auto_round_says(name: str, files: Path, reading: ModuleType) -> None:
    assert "quantization_config" in json.loads((files / name / "config.json").read_text())
    checkpoint = Checkpoint.open(files / name)
    assert {(layer.spec.format, layer.spec.back_format) for layer in checkpoint.manifest.layers} == {
        (FORMATS[name], FORMATS[name])
    }
    assert checkpoint.computed_as_stored
    assert isinstance(load_trunk(checkpoint, 1), LeanTrunk)
    assert checkpoint.trunk_tensors().linear("model.layers.1.self_attn.o_proj.weight").format == FORMATS[name]
    theirs = load_file(files / "logits.safetensors")[name].log_softmax(-1)
    ours = reading.logits(checkpoint, TOKENS).log_softmax(-1)
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < DIVERGENCE
    top = theirs.topk(2, -1).values
    sure = (top[:, 0] - top[:, 1]) > 0.2
    assert sure.sum() >= len(sure) // 2
    assert torch.equal(ours.argmax(-1)[sure], theirs.argmax(-1)[sure])
