"""Checkpoints that auto-round, GPTQModel and AutoAWQ wrote (the make.py beside each archive), and what they say."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk

# Archive, and directory in it → the format that experts and trunk are computed in. What lies in an order of its own,
# in more than one group, is expanded.
FORMATS = {
    ("auto_round", "auto_round"): "int4_g128", ("auto_round", "auto_gptq"): "int4_g64",
    ("auto_round", "asymmetric"): "int4_g128", ("auto_round", "auto_awq"): "int4_g128",
    ("auto_round", "int4"): "int4_g32", ("auto_round", "int8"): "q8_0", ("auto_round", "fp8"): "fp8_block",
    ("gptqmodel", "usual"): "int4_g128", ("gptqmodel", "asymmetric"): "int4_g128",
    ("gptqmodel", "version_2"): "int4_g32", ("gptqmodel", "ordered"): "bf16",
    ("gptqmodel", "ordered_version_2"): "bf16", ("gptqmodel", "one_group"): "int4_g128",
    ("autoawq", "gemm"): "int4_g128", ("autoawq", "gemm_32"): "int4_g32", ("autoawq", "gemv"): "int4_g64",
}  # fmt: skip
BACK = {("gptqmodel", "ordered_version_2"): "int4_g128"}  # its down projections are one group
TOKENS = [3, 17, 5, 99, 42, 8, 61, 7, 30, 77, 12, 110]
STEPS = 6  # of them, that are decoded
DIVERGENCE = 1e-3  # nats a token: inputs are rounded to 8 bits here and to f16 there; a wrong row costs 0.1 and more


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the directory that an archive was unpacked into."""
    made: dict[str, Path] = {}

    def unpack(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            with tarfile.open(Path(__file__).parent / name / f"{name}.tar.xz") as archive:
                archive.extractall(made[name], filter="data")
        return made[name]

    return unpack


@pytest.mark.parametrize(("project", "name"), list(FORMATS))
def test_it_says_what_its_project_says(
    project: str, name: str, files: Callable[[str], Path], reading: ModuleType
) -> None:
    folder, format = files(project) / name, FORMATS[project, name]
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint.open(folder)
    back = BACK.get((project, name), format)
    assert {(layer.spec.format, layer.spec.back_format) for layer in checkpoint.manifest.layers} == {(format, back)}
    assert checkpoint.computed_as_stored == (format != "bf16")
    assert isinstance(load_trunk(checkpoint, 1), LeanTrunk)
    assert checkpoint.trunk_tensors().linear("model.layers.0.self_attn.o_proj.weight").format == format
    theirs = load_file(files(project) / "logits.safetensors")[name].log_softmax(-1)
    ours, continued = (rows.log_softmax(-1) for rows in reading.passes(checkpoint, TOKENS, STEPS))
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < DIVERGENCE
    top = theirs.topk(2, -1).values
    sure = (top[:, 0] - top[:, 1]) > 0.2
    assert sure.sum() >= len(sure) // 2
    assert torch.equal(ours.argmax(-1)[sure], theirs.argmax(-1)[sure])
    # As a greedy text is made: the token after each of the last ones, which come one by one.
    theirs, sure = theirs[-STEPS:], sure[-STEPS:]
    assert sure.any() and (theirs.exp() * (theirs - continued)).sum(-1).mean() < DIVERGENCE
    assert torch.equal(continued.argmax(-1)[sure], theirs.argmax(-1)[sure])
