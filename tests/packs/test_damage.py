"""What is wrong with a pack is found and named: flipped bits, lying manifests, torn journals."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from moehive.coordinator.checkpoints.opening import open_model, trunk_of
from moehive.coordinator.checkpoints.pack import manifest
from moehive.coordinator.checkpoints.pack.checkpoint import PackCheckpoint
from moehive.coordinator.checkpoints.pack.convert import convert
from moehive.coordinator.checkpoints.pack.journal import Journal
from moehive.coordinator.checkpoints.pack.manifest import (
    NAME,
    content_fingerprint,
    offsets,
    read_manifest,
    write_manifest,
)
from moehive.coordinator.checkpoints.pack.verify import verify
from moehive.coordinator.cli import packs
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.manifest import to_bytes

SPEC = ExpertSpec(hidden_size=64, intermediate_size=32, activation="silu")
MANIFEST = Manifest("small", "0" * 64, (LayerGeometry(8, 2, SPEC), LayerGeometry(4, 2, SPEC)))


@pytest.fixture(scope="module")
def whole(safetensors_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pack; do not write to it."""
    pack = tmp_path_factory.mktemp("whole") / "pack"
    convert(open_model(str(safetensors_model)), pack, "keep", workers=1)
    return pack


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("version", [1, 2])
def test_a_pack_of_an_older_version_is_checked_by_its_sha256(version: int, whole: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(whole, tmp_path / "pack"))
    inner = msgpack.unpackb(msgpack.unpackb((pack / NAME).read_bytes())["body"])
    opened, layers = open_model(str(pack)), read_manifest(pack).manifest.layers
    inner["version"] = version
    inner["hashes"] = [
        b"".join(hashlib.sha256(opened.expert_blob(ExpertId(n, e)).numpy()).digest() for e in range(layer.experts))
        for n, layer in enumerate(layers)
    ]
    inner["trunk"] = [
        [name, nbytes, hashlib.sha256((pack / "trunk" / name).read_bytes()).digest()]
        for name, nbytes, _ in inner["trunk"]
    ]
    described = read_manifest(pack).manifest
    fingerprint = content_fingerprint(described, tuple(inner["hashes"]))
    inner["manifest"] = to_bytes(replace(described, fingerprint=fingerprint))
    body = msgpack.packb(inner)
    (pack / NAME).write_bytes(msgpack.packb({"body": body, "sha256": hashlib.sha256(body).digest()}))
    found = verify(pack, threads=2)
    assert found.damaged == () and found.damaged_files == ()
    old = open_model(str(pack))
    assert isinstance(old, PackCheckpoint) and old.expert_digest(ExpertId(0, 0)) is None
    flip(pack / "experts-00000.bin", 100, 3)
    assert verify(pack, threads=2).damaged == (ExpertId(0, 0),)
    with pytest.raises(CoordinatorError, match="is damaged"):
        old.expert_blob(ExpertId(0, 0))


Layers = tuple[LayerGeometry, ...]


def _with_spec(layers: Layers, **changes: Any) -> Layers:
    return tuple(replace(layer, spec=replace(layer.spec, **changes)) for layer in layers)


# Each takes as many bytes as the truth.
LIES: dict[str, Callable[[Layers], Layers]] = {
    "the hidden_size of MoE layer 0 is 96, where its model has 64": lambda layers: _with_spec(
        layers, hidden_size=96, intermediate_size=64
    ),
    "the activation of MoE layer 0 is 'gelu'": lambda layers: _with_spec(layers, activation="gelu"),
    "the up_offset of MoE layer 0 is 1.0": lambda layers: _with_spec(layers, up_offset=1.0),
    "the top_k of MoE layer 1 is 1, where its model has 2": lambda layers: (
        layers[0],
        replace(layers[1], top_k=1),
        layers[2],
    ),
    "a number of MoE layers is 2, where its model has 3": lambda layers: layers[:2],
}


@pytest.mark.parametrize("which", ["safetensors_model", "gguf_model", "in place"])
@pytest.mark.parametrize("words", LIES)
def test_a_manifest_that_lies_while_its_files_are_there(
    words: str, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue("gguf_model" if which == "in place" else which)
    pack = tmp_path / "pack"
    convert(open_model(str(model)), pack, None if which == "in place" else "keep", workers=1)
    made = read_manifest(pack)
    layers = LIES[words](made.manifest.layers)
    hashes = made.hashes[: len(layers)]
    wrong = replace(made.manifest, layers=layers)
    write_manifest(pack, replace(made, manifest=wrong, hashes=hashes))
    for read in (lambda: open_model(str(pack)), lambda: verify(pack, threads=1)):
        with pytest.raises(CoordinatorError, match="contradicts itself"):
            read()
    # And one that is true to itself.
    wrong = replace(wrong, fingerprint=content_fingerprint(wrong, hashes))
    write_manifest(pack, replace(made, manifest=wrong, hashes=hashes))
    for read in (lambda: open_model(str(pack)), lambda: verify(pack, threads=1)):
        with pytest.raises(CoordinatorError, match=words):
            read()


def test_a_manifest_of_another_format_of_the_same_size(whole: Path, safetensors_model: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(whole, tmp_path / "pack"))
    made = read_manifest(pack)
    write_manifest(
        pack, replace(made, manifest=replace(made.manifest, layers=_with_spec(made.manifest.layers, format="f16")))
    )
    with pytest.raises(CoordinatorError, match="contradicts itself"):
        open_model(str(pack))
    # One in place has the source's own formats to be held against, whatever it says.
    convert(open_model(str(safetensors_model)), tmp_path / "in place", None, workers=1)
    made = read_manifest(tmp_path / "in place")
    wrong = replace(made.manifest, layers=_with_spec(made.manifest.layers, format="f16"))
    wrong = replace(wrong, fingerprint=content_fingerprint(wrong, made.hashes))
    write_manifest(tmp_path / "in place", replace(made, manifest=wrong))
    with pytest.raises(CoordinatorError, match="names other formats than"):
        open_model(str(tmp_path / "in place"))


@pytest.mark.parametrize("seed", range(6))
def test_one_flipped_bit_is_found_and_its_expert_named(seed: int, whole: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(whole, tmp_path / "pack"))
    layer = read_manifest(pack).manifest.layers[0]
    draw = random.Random(seed)
    number = draw.randrange(3)
    path = pack / f"experts-{number:05d}.bin"
    offset = draw.randrange(path.stat().st_size)
    flip(path, offset, draw.randrange(8))
    damaged = ExpertId(number, bisect_right(offsets(layer), offset) - 1)
    found = verify(pack, threads=2)
    assert found.damaged == (damaged,) and found.damaged_files == ()
    if offset - offsets(layer)[damaged.expert] < layer.spec.nbytes:  # else between two experts: nobody reads that
        with pytest.raises(CoordinatorError, match=rf"Expert {damaged.expert} of MoE layer {number} .* is damaged"):
            open_model(str(pack)).expert_blob(damaged)


def test_a_flipped_bit_of_the_trunk_or_the_manifest_is_found(whole: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(whole, tmp_path / "pack"))
    flip(pack / "trunk" / "model.safetensors", 9000, 0)
    assert verify(pack, threads=1).damaged_files == ("model.safetensors",)
    for offset in range(0, (pack / NAME).stat().st_size, 97):
        flip(pack / NAME, offset, 3)
        with pytest.raises(CoordinatorError):
            read_manifest(pack)
        flip(pack / NAME, offset, 3)
    read_manifest(pack)


def test_a_flipped_bit_of_a_source_in_place_is_found(gguf_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    shutil.copyfile(gguf_model, source)
    stat = source.stat()
    convert(open_model(str(source)), tmp_path / "pack", None, workers=2)
    opened = open_model(str(source))
    place = opened._file.tensors["blk.1.ffn_down_exps.weight"].stored  # type: ignore[union-attr]
    flip(source, place.begin + 5 * place.nbytes // 6 + 7, 0)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk that forgets
    assert verify(tmp_path / "pack", threads=2).damaged == (ExpertId(1, 5),)


@pytest.mark.parametrize("which", ["gguf_model", "safetensors_model"])
def test_a_flipped_bit_of_the_trunk_of_a_source_in_place_is_found(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Path = request.getfixturevalue(which)
    copy = shutil.copytree if model.is_dir() else shutil.copyfile
    source = Path(copy(model, tmp_path / model.name))
    pack = tmp_path / "pack"
    convert(open_model(str(source)), pack, None, workers=1)
    assert verify(pack, threads=1).damaged_files == ()
    trunk = trunk_of(open_model(str(source))).trunk_stored()
    stored = (
        trunk["model.layers.0.self_attn.v_proj.weight"]
        if isinstance(trunk, dict)
        else next(one.stored for one in trunk if one.name == "blk.0.attn_v.weight")
    )
    stat = stored.path.stat()
    flip(stored.path, stored.begin + stored.nbytes // 2, 2)
    os.utime(stored.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk that forgets
    found = verify(pack, threads=1)
    assert found.damaged == () and found.damaged_files == (stored.name,)
    with pytest.raises(
        CoordinatorError, match=f"{source}, which .* in place, is damaged: the trunk's {stored.name}; get"
    ):
        packs.verify(pack)
    flip(stored.path, stored.begin + stored.nbytes // 2, 2)
    os.utime(stored.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if model.is_dir():  # a GGUF's tokenizer is in its header
        (source / "merges.txt").write_text("#version: 0.3\n")
        assert verify(pack, threads=1).damaged_files == ("merges.txt",)


def test_a_pack_in_place_without_hashes_of_its_trunk(
    gguf_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier builds made them: it opens, verify says what it did not read, and converting again adds them."""
    source, pack = open_model(str(gguf_model)), tmp_path / "pack"
    convert(source, pack, None, workers=1)
    made = read_manifest(pack)
    monkeypatch.setattr(manifest, "VERSION", 3)
    write_manifest(pack, replace(made, trunk=()))
    monkeypatch.undo()
    assert read_manifest(pack).version == 3
    packs.verify(pack)
    assert "Its trunk was not read" in capsys.readouterr().out
    assert convert(source, pack, None, workers=1).in_place
    assert read_manifest(pack) == made
    packs.verify(pack)
    assert "Its trunk was not read" not in capsys.readouterr().out


def test_files_of_another_size_or_that_are_gone_are_refused(whole: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(whole, tmp_path / "pack"))
    file = pack / "experts-00001.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-4096])
    with pytest.raises(CoordinatorError, match="belong into it"):
        open_model(str(pack))
    file.unlink()
    with pytest.raises(CoordinatorError, match="copy the pack again"):
        open_model(str(pack))


@pytest.mark.parametrize("which", ["gguf_model", "safetensors_model"])
def test_links_out_of_a_pack_are_refused(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Each lies elsewhere with the right bytes; a link within the pack may stay."""
    pack, elsewhere = tmp_path / "pack", tmp_path / "elsewhere"
    convert(open_model(str(request.getfixturevalue(which))), pack, "keep", workers=1)
    trunk = "trunk/trunk.gguf" if which == "gguf_model" else "trunk/model.safetensors"
    for name in ("experts-00001.bin", trunk, "trunk"):
        shutil.move(pack / name, elsewhere)
        (pack / name).symlink_to(elsewhere)
        for read in (lambda: open_model(str(pack)), lambda: verify(pack, threads=1)):
            with pytest.raises(CoordinatorError, match="is a link that leads out of the pack; put the file itself"):
                read()
        (pack / name).unlink()
        shutil.move(elsewhere, pack / name)
    shutil.move(pack / "experts-00001.bin", pack / "other.bin")
    (pack / "experts-00001.bin").symlink_to("other.bin")
    assert verify(pack, threads=1).damaged == ()


def test_what_is_no_pack_is_told_how_to_become_one(tmp_path: Path) -> None:
    with pytest.raises(CoordinatorError, match=r"is no pack, .*; `moehive convert` makes one"):
        verify(tmp_path, 1)


def test_what_verify_says(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = Path(shutil.copytree(whole, tmp_path / "pack"))
    packs.verify(pack)
    assert f"{pack} is whole: 18 experts" in " ".join(capsys.readouterr().out.split())
    places = offsets(read_manifest(pack).manifest.layers[0])
    flip(pack / "experts-00002.bin", places[4] + 9, 1)
    flip(pack / "trunk" / "model.safetensors", 9000, 0)
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "verify", str(pack)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert " ".join(done.stderr.split()).endswith(
        f"{pack} is damaged: expert 4 of MoE layer 2, the trunk's model.safetensors; copy or convert the model again."
    )
    with pytest.raises(CoordinatorError):
        packs.verify(pack, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["damaged"] == [{"layer": 2, "expert": 4}] and said["damaged_files"] == ["model.safetensors"]


packed = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(["version", "manifest", "identity", "hashes", "source", "trunk"]), value=packed)
@example(field="source", value="\n")
def test_a_manifest_with_any_field_changed_gives_one_sentence(
    field: str, value: Any, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outer = msgpack.unpackb((whole / NAME).read_bytes())
    inner = msgpack.unpackb(outer["body"])
    assume(field != "source" or not isinstance(value, str) or not value.isprintable())  # other text may be a path
    inner[field] = value
    body = msgpack.packb(inner)
    folder = tmp_path_factory.mktemp("lying")
    (folder / NAME).write_bytes(msgpack.packb({"body": body, "sha256": hashlib.sha256(body).digest()}))
    with pytest.raises(CoordinatorError) as caught:  # the files are not there, so even a good one is refused
        read_manifest(folder)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_torn_journal_keeps_its_whole_records(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    done = [(ExpertId(layer, e), bytes([layer, e]) * 16) for layer, n in ((0, 8), (1, 4)) for e in range(n)]
    count = data.draw(st.integers(0, len(done)))
    journal = Journal(folder, b"i" * 32, MANIFEST)
    journal.append(done[:count])
    journal.close()
    raw = (folder / "journal").read_bytes()
    cut = data.draw(st.integers(0, len(raw)))
    garbage = data.draw(st.binary(max_size=50))
    (folder / "journal").write_bytes(raw[:cut] + (garbage if cut >= 40 else b""))
    again = Journal(folder, b"i" * 32, MANIFEST)
    kept = max(0, cut - 40) // 44
    assert list(again.finished.items())[:kept] == done[:kept]
    assert set(again.finished.items()) <= set(done)  # garbage never counts
    again.append(done[len(again.finished) :])
    again.close()
    last = Journal(folder, b"i" * 32, MANIFEST)
    assert list(last.finished.items()) == done
    last.close()
    with pytest.raises(CoordinatorError, match="beginning of another pack"):
        Journal(folder, b"j" * 32, MANIFEST)
