"""What an estimate is of: a directory, a GGUF, a pack, a hub id; nothing but headers and a config is read of them."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file

from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.convert import convert
from moehive.coordinator.estimate.headers import of_files

TESTS = Path(__file__).resolve().parents[1]
NAME = "organization/small-moe"


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"moehive_estimate_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    """Rows and columns are whole blocks of every format, so that no layout adds padding."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, moe_intermediate_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("directory") / "small"
    model.save_pretrained(folder)
    return folder


def told(source: str, **more: str) -> dict[str, Any]:
    """What `moehive estimate --json` says on this machine."""
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "estimate", source, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | more)
    assert done.returncode == 0, done.stderr
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def test_a_directory_has_the_bytes_of_its_tensors(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    row = told(str(directory))
    assert (row["format"], row["expert_bytes"]) == ("bf16", experts)
    assert row["total_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert of_files(str(directory)).weights == sum(tensor.numel() for tensor in tensors.values())
    assert row["active_expert_bytes"] == experts // 2
    # As it is, and in what is smaller: the formats that a conversion offers.
    assert row["formats"][0]["format"] == "bf16" and row["formats"][-1]["format"] == "q2_k"
    assert all(one["total_bytes"] < row["total_bytes"] for one in row["formats"][1:])


def test_a_gguf_has_the_bytes_of_its_tensors(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    _module(TESTS / "coordinator" / "gguf_writer.py").write(copy.deepcopy(model).float(), model.config, path, "Q8_0")
    tensors = gguf.GGUFReader(path).tensors
    row = told(str(path))
    assert row["format"] == "q8_0"
    assert row["expert_bytes"] == sum(int(tensor.n_bytes) for tensor in tensors if "_exps" in tensor.name)
    assert row["total_bytes"] == sum(int(tensor.n_bytes) for tensor in tensors)
    assert row["parts"]["attention"] == sum(
        int(t.n_bytes) for t in tensors if ".attn_" in t.name and "norm" not in t.name
    )


def test_a_pack_has_the_formats_that_it_was_made_in(directory: Path, tmp_path: Path) -> None:
    source = open_model(str(directory))
    made = convert(source, tmp_path / "pack", "q4_k", 1)
    row, of_source = told(str(tmp_path / "pack")), of_files(str(directory))
    assert (row["format"], row["expert_bytes"]) == ("q4_k", made.expert_bytes)
    assert row["expert_bytes"] == of_source.expert_bytes * 144 // 512
    assert row["trunk_bytes"] == of_source.trunk_bytes  # stays as it is


def test_of_a_hub_id_the_config_alone_is_downloaded(directory: Path, tmp_path: Path, hub_server: ModuleType) -> None:
    names = ("config.json", "model.safetensors")
    with hub_server.HubServer({NAME: {name: (directory / name).read_bytes() for name in names}}) as hub:
        row = told(NAME, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET="1")
        assert set(hub.sent) == {"config.json"}
    assert row["model"] == NAME and row["format"] == "bf16"
    stored = of_files(str(directory))
    assert row["expert_bytes"] == stored.expert_bytes
    assert row["total_bytes"] == pytest.approx(stored.total_bytes, rel=0.01)  # norms and routers count as f32
    assert {one["format"] for one in row["formats"]} >= {"bf16", "q4_k", "q2_k"}
