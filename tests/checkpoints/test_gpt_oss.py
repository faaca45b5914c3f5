"""gpt-oss in the very layout of its publisher's repository: served, pulled without the copies that nobody needs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from by_path import load
from hub_server import HubServer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from moehive.coordinator.checkpoints.hub_files import HubFile, needed_files
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.geometry import ExpertId

gpt_oss = load(Path(__file__).with_name("gpt_oss.py"))
NAME = "openai/gpt-oss-tiny"


@pytest.fixture(scope="module")
def published(wide: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository; do not write to it."""
    folder = tmp_path_factory.mktemp("gpt_oss") / "repository"
    gpt_oss.publish(wide("gpt_oss"), folder)
    for name in gpt_oss.BESIDE:
        (folder / name).write_text(json.dumps({"file": name}))
    return folder


def test_its_text_is_transformers_own(published: Path, reading: ModuleType) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        published, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    checkpoint = open_model(str(published))
    assert {layer.spec.format for layer in checkpoint.manifest.layers} == {"mxfp4"}
    assert checkpoint.computed_as_stored and isinstance(load_trunk(checkpoint, 1), LeanTrunk)
    experts = model.model.layers[1].mlp.experts
    found = reading.decoded(checkpoint, ExpertId(1, 3))
    up = experts.gate_up_proj[3].detach().T
    assert torch.equal(found["up"], torch.cat([up[::2], up[1::2]]).float())
    assert torch.equal(found["down"], experts.down_proj[3].detach().T.float())
    bias = experts.gate_up_proj_bias[3].detach().float()
    assert torch.equal(found["up_bias"], torch.cat([bias[::2], bias[1::2]]))
    reading.check_text(model.float(), checkpoint)


def test_pull_leaves_the_other_copies_away(published: Path, tmp_path: Path) -> None:
    held = {path.relative_to(published).as_posix(): path for path in published.rglob("*") if path.is_file()}
    files = {name: path.read_bytes() for name, path in held.items()} | {"README.md": b"x", "USAGE_POLICY": b"x"}
    with HubServer({NAME: files}) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "moehive.coordinator.cli.main", "pull", NAME, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wanted = {name for name in held if "/" not in name}
    assert {name for name, count in hub.sent.items() if count} == wanted
    folder = Path(json.loads(done.stdout)["path"])
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == wanted
    pulled, whole = open_model(str(folder)), open_model(str(published))
    assert pulled.manifest.layers == whole.manifest.layers
    assert torch.equal(pulled.expert_blob(ExpertId(1, 2)), whole.expert_blob(ExpertId(1, 2)))


@pytest.mark.parametrize("kept", [["original"], ["metal"], ["original", "metal"], ["original", "config.json"]])
def test_a_download_of_other_copies_alone_is_refused(kept: list[str], published: Path, tmp_path: Path) -> None:
    for name in kept:
        copy = shutil.copy if (published / name).is_file() else shutil.copytree
        copy(published / name, tmp_path / name)
    for folder in (tmp_path, *(tmp_path / name for name in kept if name != "config.json")):
        with pytest.raises(CoordinatorError, match=r"own layout.*get the files at the top of its repository") as said:
            open_model(str(folder))
        assert "\n" not in str(said.value) and str(said.value).endswith(".")
    if kept == ["original"]:
        assert "block.1.attn.qkv.weight" in load_file(tmp_path / "original" / "model.safetensors")


def test_a_repository_of_other_copies_alone_is_refused() -> None:
    files = [HubFile(name, 100, None) for name in ("original/config.json", "original/model.safetensors")]
    with pytest.raises(CoordinatorError, match=r"only as original/model\.safetensors"):
        needed_files(NAME, files, None, lambda name: Path(name))
