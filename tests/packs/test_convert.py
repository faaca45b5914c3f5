"""A pack means what its source means, in its format or in another, and says so when it does not any more."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from moehive.coordinator.bench.convert_kills import PLACES
from moehive.coordinator.bench.small_disk import small_disk
from moehive.coordinator.checkpoints.gguf.file import open_gguf
from moehive.coordinator.checkpoints.opening import ModelSource, open_model
from moehive.coordinator.checkpoints.pack import convert as conversions
from moehive.coordinator.checkpoints.pack.checkpoint import PackCheckpoint
from moehive.coordinator.checkpoints.pack.convert import Chosen, convert
from moehive.coordinator.checkpoints.pack.verify import verify
from moehive.coordinator.settings import SettingsError
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.blob import build_blob, decode_tensor, tensor_views
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import ExpertId, ExpertSpec, GeometryError

Blobs = Callable[[ModelSource], dict[ExpertId, bytes]]


def opened(pack: Path) -> PackCheckpoint:
    found = open_model(str(pack))
    assert isinstance(found, PackCheckpoint)
    return found


def numbers(spec: ExpertSpec, blob: bytes) -> dict[str, torch.Tensor]:
    """A blob's tensors decoded, f32."""
    views = tensor_views(spec, aligned(blob))
    return {place.name: decode_tensor(place, views[place.name]).float() for place in spec.tensors}


def aligned(data: bytes) -> torch.Tensor:
    memory = torch.empty(len(data) + 63, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    memory[start : start + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return memory[start : start + len(data)]


@pytest.mark.parametrize("which", ["safetensors_model", "gguf_model"])
def test_a_copy_has_the_same_experts_and_trunk(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, blobs: Blobs
) -> None:
    path: Path = request.getfixturevalue(which)
    source = open_model(str(path))
    made = convert(source, tmp_path / "pack", "keep", workers=2)
    assert not made.in_place and made.resumed == 0
    pack = opened(tmp_path / "pack")
    assert pack.manifest.layers == source.manifest.layers
    assert blobs(pack) == blobs(source)
    for expert in (ExpertId(0, 0), ExpertId(1, 5)):
        place = pack.expert_range(expert)
        assert place is not None and place.offset % 4096 == 0
        with place.path.open("rb") as file:
            file.seek(place.offset)
            assert file.read(place.nbytes) == source.expert_blob(expert).numpy().tobytes()
    assert not (tmp_path / "pack" / "journal").exists()


def test_the_trunk_of_safetensors_is_loaded_from_the_pack(safetensors_model: Path, tmp_path: Path) -> None:
    source = open_model(str(safetensors_model))
    convert(source, tmp_path / "pack", "q8_0", workers=2)
    wanted = source.load_trunk().model.state_dict()
    found = opened(tmp_path / "pack").load_trunk().model.state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert tensor.is_meta == found[name].is_meta
        assert tensor.is_meta or torch.equal(tensor, found[name]), name


def test_the_trunk_of_a_gguf_is_a_gguf_with_the_same_tensors_and_values(gguf_model: Path, tmp_path: Path) -> None:
    convert(open_model(str(gguf_model)), tmp_path / "pack", "keep", workers=2)
    whole, trunk = open_gguf(gguf_model), open_gguf(tmp_path / "pack" / "trunk" / "trunk.gguf")
    assert trunk.metadata == whole.metadata
    assert trunk.tensors.keys() == {name for name in whole.tensors if "_exps." not in name}
    for name, tensor in trunk.tensors.items():
        assert (tensor.type, tensor.shape) == (whole.tensors[name].type, whole.tensors[name].shape)
        assert torch.equal(tensor.rows(), whole.tensors[name].rows()), name
    theirs = {tensor.name for tensor in GGUFReader(tmp_path / "pack" / "trunk" / "trunk.gguf").tensors}
    assert theirs == trunk.tensors.keys()


def test_a_copy_needs_its_source_no_more_and_copies_are_equal(
    safetensors_model: Path, tmp_path: Path, blobs: Blobs
) -> None:
    source = tmp_path / "source"
    shutil.copytree(safetensors_model, source)
    wanted = blobs(open_model(str(source)))
    convert(open_model(str(source)), tmp_path / "first", "keep", workers=1)
    for file in source.iterdir():
        os.utime(file, ns=(1, 1))  # the source counts as another, the pack's content does not
    convert(open_model(str(source)), tmp_path / "second", "keep", workers=2)
    shutil.rmtree(source)
    first, second = opened(tmp_path / "first"), opened(tmp_path / "second")
    assert blobs(first) == wanted
    assert first.manifest.fingerprint == second.manifest.fingerprint
    assert (tmp_path / "first" / "trunk" / "merges.txt").read_text() == "#version: 0.2\n"


def test_a_computable_source_is_served_in_place(gguf_model: Path, tmp_path: Path, blobs: Blobs) -> None:
    source = tmp_path / "source.gguf"
    shutil.copyfile(gguf_model, source)
    made = convert(open_model(str(source)), tmp_path / "pack", None, workers=2)
    assert made.in_place and made.trunk_bytes == 0
    assert [file.name for file in (tmp_path / "pack").iterdir()] == ["pack.msgpack"]
    assert blobs(opened(tmp_path / "pack")) == blobs(open_model(str(source)))
    os.utime(source, ns=(1, 1))
    with pytest.raises(CoordinatorError, match="was changed after"):
        open_model(str(tmp_path / "pack"))
    source.unlink()
    with pytest.raises(CoordinatorError, match="which is gone"):
        open_model(str(tmp_path / "pack"))


def test_a_directory_of_safetensors_is_served_in_place(safetensors_model: Path, tmp_path: Path, blobs: Blobs) -> None:
    source = tmp_path / "source"
    shutil.copytree(safetensors_model, source)
    made = convert(open_model(str(source)), tmp_path / "pack", None, workers=2)
    assert made.in_place and made.trunk_bytes == 0
    assert [file.name for file in (tmp_path / "pack").iterdir()] == ["pack.msgpack"]
    pack = opened(tmp_path / "pack")
    assert blobs(pack) == blobs(open_model(str(source))) and pack.expert_range(ExpertId(0, 0)) is None
    wanted = open_model(str(source)).load_trunk().model.state_dict()
    found = pack.load_trunk().model.state_dict()
    assert all(found[name].is_meta or torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert verify(tmp_path / "pack", threads=2).damaged == ()
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
    with pytest.raises(CoordinatorError, match="was changed after"):
        open_model(str(tmp_path / "pack"))


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "int4_g32", "mxfp4", "fp8_block", "f16"])
def test_another_format_holds_what_its_encoder_gives(
    format: str, safetensors_model: Path, tmp_path: Path, blobs: Blobs
) -> None:
    source = open_model(str(safetensors_model))
    convert(source, tmp_path / "pack", format, workers=2)
    pack = opened(tmp_path / "pack")
    for layer, (old, new) in enumerate(zip(source.manifest.layers, pack.manifest.layers, strict=True)):
        assert new.spec.format == format and new.spec.back_format == format
        expert = ExpertId(layer, layer)
        tensors = numbers(old.spec, source.expert_blob(expert).numpy().tobytes())
        # The whole expert at once, through the blob's own builder; a pack is encoded a few rows at a time.
        assert pack.expert_blob(expert).numpy().tobytes() == build_blob(new.spec, tensors).numpy().tobytes()
    assert verify(tmp_path / "pack", threads=2).damaged == ()


def test_a_pack_of_blocks_can_be_encoded_anew(gguf_model: Path, tmp_path: Path) -> None:
    source = open_model(str(gguf_model))
    convert(source, tmp_path / "pack", "q8_0", workers=2)
    pack = opened(tmp_path / "pack")
    expert = ExpertId(1, 3)
    old = numbers(source.manifest.layers[1].spec, source.expert_blob(expert).numpy().tobytes())
    new = numbers(pack.manifest.layers[1].spec, pack.expert_blob(expert).numpy().tobytes())
    for name in old:
        assert torch.allclose(old[name], new[name], atol=float(old[name].abs().max()) / 100)


class _ReadOnly:
    """A format that has no encoder."""

    def encode(self, numbers: torch.Tensor, out: torch.Tensor) -> None:
        raise GeometryError("Weights can't be turned into iq4_xs.")


def test_formats_that_have_no_encoder_or_no_name_are_refused(
    safetensors_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(str(safetensors_model))
    monkeypatch.setitem(FORMATS, "iq4_xs", _ReadOnly())
    with pytest.raises(CoordinatorError, match="can't be turned into iq4_xs here"):
        convert(source, tmp_path / "pack", "iq4_xs", workers=1)
    with pytest.raises(SettingsError, match="Unknown format 'q9'"):
        convert(source, tmp_path / "pack", "q9", workers=1)
    assert not (tmp_path / "pack").exists()


def test_a_folder_that_is_something_else_is_left_alone(
    safetensors_model: Path, gguf_model: Path, tmp_path: Path
) -> None:
    source = open_model(str(safetensors_model))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(CoordinatorError, match="is not empty and no pack"):
        convert(source, tmp_path / "mine", "keep", workers=1)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["file"]
    convert(source, tmp_path / "pack", "keep", workers=1)
    assert convert(source, tmp_path / "pack", "keep", workers=1).resumed == 18  # done already: nothing happens
    with pytest.raises(CoordinatorError, match="pack of another model or format"):
        convert(open_model(str(gguf_model)), tmp_path / "pack", "keep", workers=1)
    with pytest.raises(CoordinatorError, match="pack of another model or format"):
        convert(source, tmp_path / "pack", "q8_0", workers=1)


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("format", ["keep", "q8_0"])
@pytest.mark.parametrize("name", ["safetensors_model", "gguf_model"])
def test_a_disk_that_is_too_small_is_refused_before_anything_is_there(
    name: str, format: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(str(request.getfixturevalue(name)))
    convert(source, tmp_path / "whole", format, workers=2)
    needed = on_disk(tmp_path / "whole")
    headers = 64 << 10  # and pages of files that are not quite full
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - headers))
    with pytest.raises(CoordinatorError, match=r"pack takes .* more, and its disk has .* left: free some space, or"):
        convert(source, tmp_path / "pack", format, workers=2)
    assert not (tmp_path / "pack").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(conversions, "write_manifest", raise_interrupt)
        convert(source, tmp_path / "pack", format, workers=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=headers))  # enough for what is left
    assert convert(source, tmp_path / "pack", format, workers=2).resumed == 18


def test_a_full_disk_says_how_much_is_still_to_come(
    gguf_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(str(gguf_model))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversions, "write_trunk", full)
    with pytest.raises(CoordinatorError, match=r"free some space \(\d[\d.]* kB are still to come\) and run the same"):
        convert(source, tmp_path / "pack", "keep", workers=2)
    monkeypatch.undo()
    assert convert(source, tmp_path / "pack", "keep", workers=2).resumed == 18


_LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.convert import Chosen, convert
from dataclasses import replace
from pathlib import Path
source = open_model(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
for _ in range(2):
    try:
        convert(source, Path(sys.argv[2]), "keep", workers=2, commit_bytes=source.manifest.total_bytes // 6)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_a_full_disk_loses_nothing(gguf_model: Path, tmp_path: Path, blobs: Blobs) -> None:
    source = open_model(str(gguf_model))
    limit = source.manifest.layers[0].spec.nbytes * 3  # no file may grow beyond that: a full disk
    command = [sys.executable, "-c", _LIMITED, str(gguf_model), str(tmp_path / "pack"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refusals = done.stdout.splitlines()
    assert len(refusals) == 2
    for refusal in refusals:
        assert refusal.startswith("CoordinatorError: ") and "can't be written" in refusal
    with pytest.raises(CoordinatorError, match="not finished; run the same"):
        open_model(str(tmp_path / "pack"))
    made = convert(source, tmp_path / "pack", "keep", workers=2)
    assert 0 < made.resumed < made.experts
    assert blobs(opened(tmp_path / "pack")) == blobs(source)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # of this process


_INTERRUPTED = """
import os, signal, sys
from moehive.coordinator.checkpoints.pack import experts
from moehive.coordinator.checkpoints.pack.journal import Journal
from moehive.coordinator.cli.main import main

def count(journal, done, append=Journal.append, left=[3]):
    append(journal, done)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGINT)

experts.COMMIT_SECONDS = 0.0  # as if each expert took long
Journal.append = count
sys.argv[0] = "moehive"
main()
"""


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_an_interruption(many_experts: Path, tmp_path: Path, blobs: Blobs) -> None:
    pack = tmp_path / "pack"
    command = [sys.executable, "-c", _INTERRUPTED, "convert", str(many_experts), str(pack), "--format", "keep"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    with pytest.raises(CoordinatorError, match="not finished; run the same"):
        open_model(str(pack))
    source = open_model(str(many_experts))
    made = convert(source, pack, "keep", workers=2)
    assert 3 <= made.resumed < made.experts
    assert blobs(opened(pack)) == blobs(source)


@pytest.fixture(scope="module")
def killed(many_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a few of the benchmark's seeds; `moehive bench convert --kills 40` is all of them."""
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "bench", "convert"]
    command += ["--model", str(many_experts), "--kills", "20"]
    command += ["--state-dir", str(tmp_path_factory.mktemp("killed")), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def test_kills_lose_nothing(killed: list[dict[str, Any]]) -> None:
    assert len(killed) == 20
    for row in killed:
        assert row["same"], row
        assert row["journaled_first"] <= row["journaled"] == row["resumed"] <= row["experts"], row
    # A run that goes on may be done before its own kill comes.
    begun = Counter(row["format"] for row in killed if 0 < row["journaled_first"] < row["experts"])
    assert begun.total() >= 5 and begun["in place"]


def test_full_disks_lose_nothing(killed: list[dict[str, Any]], tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 20) as mounted:
        if not mounted:
            pytest.skip("no tmpfs can be mounted here, so no disk could be filled")
    assert {row["full_disk"] for row in killed} - {""} == set(PLACES)
    for row in killed:
        assert row["refused"] == (row["full_disk"] != ""), row
        assert row["same"], row


def test_experts_of_one_layer_may_differ_in_their_formats(safetensors_model: Path, tmp_path: Path) -> None:
    source = open_model(str(safetensors_model))
    layers = list(source.manifest.layers)
    layers[1] = replace(layers[1], formats=(("q8_0", "q4_0"), ("bf16", "bf16"), *[("q4_0", "q8_0")] * 4))

    def encode(expert: ExpertId, blob: torch.Tensor) -> torch.Tensor:
        tensors = numbers(source.manifest.layers[expert.layer].spec, blob.numpy().tobytes())
        return build_blob(layers[expert.layer].spec_of(expert.expert), tensors)

    convert(source, tmp_path / "pack", Chosen(tuple(layers), encode), workers=2)
    pack = opened(tmp_path / "pack")
    assert pack.manifest.layers == tuple(layers)
    for expert in (ExpertId(0, 3), ExpertId(1, 0), ExpertId(1, 1), ExpertId(1, 5), ExpertId(2, 5)):
        blob = source.expert_blob(expert)
        wanted = blob if expert.layer != 1 or expert.expert == 1 else encode(expert, blob)
        assert torch.equal(pack.expert_blob(expert), wanted)
    assert verify(tmp_path / "pack", threads=1).damaged == ()
