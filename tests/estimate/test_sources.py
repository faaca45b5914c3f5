"""What an estimate is of: a directory, a GGUF, a pack, a hub id; nothing but headers and a config is read of them."""

import copy
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from by_path import load
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import load_file

from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.convert import convert
from moehive.coordinator.estimate.headers import of_files, of_hub
from moehive.coordinator.types import CoordinatorError

TESTS = Path(__file__).resolve().parents[1]
NAME = "organization/small-moe"
# What an estimate says of the model itself; speeds follow from it and from the free memory.
STORED = (
    "format",
    "total_bytes",
    "expert_bytes",
    "trunk_bytes",
    "active_expert_bytes",
    "trunk_bytes_a_token",
    "parts",
)


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


def run(source: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "estimate", source, "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def told(source: str) -> dict[str, Any]:
    """What `moehive estimate --json` says on this machine."""
    done = run(source)
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
    load(TESTS / "coordinator" / "gguf_writer.py").write(copy.deepcopy(model).float(), model.config, path, "Q8_0")
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty hub, which `moehive` asks, and this process; the cache is the test's own."""
    with HubServer({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def same(row: dict[str, Any], source: Path) -> None:
    """An estimate of a hub id says what it says of its files here."""
    here = told(str(source))
    assert row.pop("model") == NAME
    here.pop("model")
    assert {key: row[key] for key in STORED} == {key: here[key] for key in STORED}


def test_of_a_hub_id_headers_alone_are_asked_for(model: Any, hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="1MB")
    files = held(folder)
    shards = {name: data for name, data in files.items() if name.endswith(".safetensors")}
    assert len(shards) > 1
    hub.repositories[NAME] = files | {"pytorch_model.bin": b"x" * 5000, "README.md": b"x" * 5000}
    row = told(NAME)
    same(row, folder)
    assert row["format"] == "bf16" and row["formats"][-1]["format"] == "q2_k"
    for name, data in shards.items():
        assert hub.asked.pop(name) == [(0, 8), (8, header_end(data))]
    assert hub.asked == {name: [(0, len(files[name]))] for name in ("config.json", "model.safetensors.index.json")}
    assert sum(hub.sent.values()) == sum(map(header_end, shards.values())) + sum(
        stop for ((_, stop),) in hub.asked.values()
    )
    assert not list((tmp_path / "home").glob("**/blobs/*"))


@pytest.mark.parametrize("method", ["fp8", "gptq", "int4, groups of 32", "int4, by row", "int8 in words", "mxfp4"])
def test_a_hub_ids_format_is_the_stored_one(method: str, model: Any, hub: Any, tmp_path: Path) -> None:
    quantizers = load(TESTS / "checkpoints" / "quantizers.py")
    model.save_pretrained(tmp_path / "wide")
    quantizers.write(quantizers.METHODS[method], tmp_path / "wide", tmp_path / "small")
    hub.repositories[NAME] = held(tmp_path / "small")
    found = of_hub(NAME)
    assert found == replace(of_files(str(tmp_path / "small")), name=NAME)
    assert found.format == quantizers.METHODS[method][2]
    data = hub.repositories[NAME]["model.safetensors"]
    assert hub.sent["model.safetensors"] == header_end(data) < len(data) // 4


def test_of_a_hubs_gguf_the_beginning_is_asked_for(model: Any, hub: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"Small-{kind}.gguf" for kind in ("Q8_0", "Q4_0")]
    for path in paths:
        kind = path.stem.partition("-")[2]
        load(TESTS / "coordinator" / "gguf_writer.py").write(copy.deepcopy(model).float(), model.config, path, kind)
    hub.repositories[NAME] = {path.name: path.read_bytes() for path in paths}
    row = told(f"{NAME}:Q4_0")
    row["model"] = NAME
    same(row, paths[1])
    assert row["format"] == "q4_0"
    end = gguf.GGUFReader(paths[1]).data_offset
    (name,) = hub.asked
    assert name == paths[1].name
    # As much again as was read already, at most, for a header does not say its length.
    assert hub.sent[name] == hub.asked[name][-1][1] <= max(64 << 10, 2 * end) < len(hub.repositories[NAME][name]) // 4


def test_a_server_without_ranges_is_not_listened_to_any_longer(directory: Path, hub: Any) -> None:
    files = held(directory)
    hub.repositories[NAME], hub.ranges = files, False
    with pytest.raises(CoordinatorError, match=r"The hub sends no parts of model\.safetensors"):
        of_hub(NAME)


@pytest.mark.parametrize(
    ("name", "data", "size", "sentence"),
    [
        ("model.safetensors", (1 << 40).to_bytes(8, "little"), 1 << 42, "claims a header of more than 64 MiB"),
        ("model.safetensors", (40).to_bytes(8, "little") + b"x" * 40, None, "its header is not JSON"),
        ("model.safetensors", (40).to_bytes(8, "little") + b"x" * 40, 1 << 60, "names model.safetensors with"),
        ("config.json", b"{}", 1 << 27, "a config.json of 134217728 bytes, far too many"),
        ("small.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40) + bytes(1 << 17), 1 << 42, "it has a text"),
        ("../small.gguf", b"GGUF", None, "lies outside of it"),
        ("small.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 1), 1 << 30, "broke off"),
    ],
)  # fmt: skip
def test_a_hub_that_lies(name: str, data: bytes, size: int | None, sentence: str, directory: Path, hub: Any) -> None:
    """Nothing is believed: each is a sentence, and little was fetched until then."""
    config = {"config.json": (directory / "config.json").read_bytes(), "model.safetensors": b""}
    hub.repositories[NAME] = {name: data} if name.endswith(".gguf") else config | {name: data}
    if size is not None:
        hub.sizes[name] = size
    with pytest.raises(CoordinatorError) as refused:
        of_hub(NAME)
    assert sentence in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert "/tmp" not in str(refused.value)
    assert sum(hub.sent.values()) < 1 << 20


def test_a_known_model_that_the_hub_refuses_is_answered_from_the_table(hub: Any) -> None:
    done = run("nobody/Qwen3-30B-A3B-of-nobody")
    assert done.returncode == 0, done.stderr
    assert "nor such a model on the hub" in done.stderr and "qwen3-30b of the built-in table" in done.stderr
    assert {one["format"] for one in json.loads(done.stdout)["formats"]} >= {"bf16", "q4_k", "q2_k"}


def test_without_a_network_what_was_pulled_is_read(
    directory: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME] = held(directory)
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "pull", NAME]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    same(told(NAME), directory)
