"""What `moehive models` says of packs: the bytes that they take on the disk, and whether a cluster has room."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moehive import client, kernels
from moehive.coordinator.checkpoints.inventory import look
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.convert import KEEP, convert
from moehive.coordinator.cli import models


def test_the_size_of_a_pack_is_that_of_all_its_files(gguf_model: Path, tmp_path: Path) -> None:
    convert(open_model(str(gguf_model)), tmp_path / "kept", KEEP, workers=1)
    found = look("kept", tmp_path / "kept")
    wanted = sum(file.stat().st_size for file in (tmp_path / "kept").rglob("*") if file.is_file())
    assert found.problem is None and found.file_bytes == wanted > found.expert_bytes + found.trunk_bytes


def test_the_size_of_a_pack_in_place_is_its_sources_too(
    gguf_model: Path, safetensors_model: Path, tmp_path: Path
) -> None:
    for model in (gguf_model, safetensors_model):
        pack = tmp_path / model.name
        convert(open_model(str(model)), pack, None, workers=1)
        files = [model] if model.is_file() else [file for file in model.iterdir() if file.is_file()]
        wanted = sum(file.stat().st_size for file in (*files, pack / "pack.msgpack"))
        found = look("pack", pack)
        assert found.problem is None and found.file_bytes == wanted


@pytest.mark.parametrize(
    ("address", "free", "words"),
    [
        ("127.0.0.1:1", 0, "yes"),  # the trunk that is served makes way
        ("[::1]:1", -1, "no, the coordinator needs 1 B more memory for the trunk"),
        ("192.0.2.1:1", -1, "yes"),  # what is free there is not known
    ],
)
def test_a_cluster_holds_experts_and_its_coordinator_the_trunk(
    address: str,
    free: int,
    words: str,
    gguf_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    found = look("x", gguf_model)
    served = 1000  # bytes of the coordinator's process
    node = SimpleNamespace(state="ready", ram_bytes=found.expert_bytes, disk_bytes=0)

    class Cluster:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> "Cluster":
            return self

        def __exit__(self, *_: object) -> None: ...
        def status(self) -> Any:
            return SimpleNamespace(nodes=[node], resident_bytes=served)

    monkeypatch.setattr(client, "Client", Cluster)
    monkeypatch.setattr(kernels.machine, "available_memory", lambda: found.trunk_bytes - served + free)
    room = models._room(address, None, None)
    assert models._in_words(found, room) == words and models._fits(found, room) == (words == "yes")
    assert not models._fits(replace(found, expert_bytes=found.expert_bytes + 1), room)
    monkeypatch.setattr("moehive.coordinator.checkpoints.inventory.cache", lambda: None)
    models.models([gguf_model], address=address, as_json=True)
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert row["fits"] == (words == "yes")
