"""Packs whose trunk has matrices in formats of their own: what they mean, and what they keep from damage and lies."""

import itertools
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from by_path import load
from safetensors.torch import load_file

from moehive.coordinator.bench.trained_like import save_trained_like
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.checkpoint import PackCheckpoint
from moehive.coordinator.checkpoints.pack.convert import KEEP, Chosen, convert
from moehive.coordinator.checkpoints.pack.manifest import read_manifest, write_manifest
from moehive.coordinator.checkpoints.pack.matrices import NAME, TrunkMatrix, checked, offsets
from moehive.coordinator.checkpoints.pack.verify import verify
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.formats.file_rows import pack_file_rows
from moehive.kernels.geometry import Format, GeometryError
from moehive.kernels.quantizers.feedback import quantize

reading = load(Path(__file__).parents[1] / "checkpoints" / "reading.py")

FORMATS: tuple[Format, ...] = ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "iq4_nl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral in bf16 whose answers are as sure as a trained model's; do not write to it."""
    folder = tmp_path_factory.mktemp("trained-like") / "small"
    config = transformers.MixtralConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_local_experts=3,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    save_trained_like(config, folder)
    return folder


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, torch.Tensor]:
    """The matrices of the trunk that get another format."""
    tensors = load_file(model / "model.safetensors")
    return {
        name: tensor.float()
        for name, tensor in tensors.items()
        if name.endswith(("embed_tokens.weight", "lm_head.weight", "_proj.weight"))
    }


@pytest.fixture(scope="module")
def pack(model: Path, weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write to it."""
    matrices = tuple(
        TrunkMatrix(name, format, *weight.shape)
        for (name, weight), format in zip(weights.items(), itertools.cycle(FORMATS), strict=False)
    )

    def encode(one: TrunkMatrix) -> Iterable[torch.Tensor]:
        blob = torch.empty(one.nbytes, dtype=torch.uint8)
        pack_file_rows(one.format, quantize(one.format, weights[one.name]), one.columns, blob)
        return blob.split(1000)

    source = open_model(str(model))
    folder = tmp_path_factory.mktemp("trunk") / "pack"
    convert(source, folder, Chosen(source.manifest.layers, lambda _, blob: blob, matrices, encode), workers=1)
    return folder


def means(matrix: TrunkMatrix, weight: torch.Tensor) -> torch.Tensor:
    """The numbers of a matrix as the gguf package reads them."""
    stored = quantize(matrix.format, weight).numpy()
    return torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[matrix.format.upper()]))


def test_the_text_is_that_of_the_dequantized_weights(
    pack: Path, model: Path, weights: dict[str, torch.Tensor]
) -> None:
    opened: Any = open_model(str(pack))
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tensors = opened.trunk_tensors()
    ids = torch.tensor([0, 255, 17, 17, 100])
    with torch.no_grad():
        for matrix in opened.pack.matrices:
            expected = means(matrix, weights[matrix.name])
            assert torch.equal(tensors.linear(matrix.name).matrix, expected)
            assert torch.equal(tensors.tensor(matrix.name), expected)
            if matrix.name == "model.embed_tokens.weight":
                assert torch.equal(tensors.embedding(matrix.name).rows(ids), expected[ids])
            plain.get_parameter(matrix.name).copy_(expected)
    reading.check_text(plain, opened)
    stored = load_file(pack / "trunk" / "model.safetensors")
    assert stored.keys().isdisjoint(weights)  # nothing is there twice


def test_matrices_that_do_not_fit_the_model(pack: Path, tmp_path: Path) -> None:
    shutil.copytree(pack, tmp_path / "pack")
    made = read_manifest(pack)
    first, *rest = made.matrices
    for wrong in (first._replace(name="model.other.weight"), first._replace(rows=first.rows // 2)):
        changed = (wrong, *rest)
        (tmp_path / "pack/trunk" / NAME).write_bytes(bytes(offsets(changed)[-1]))
        files = tuple(replace(one, nbytes=offsets(changed)[-1]) if one.name == NAME else one for one in made.trunk)
        write_manifest(tmp_path / "pack", replace(made, matrices=changed, trunk=files))
        with pytest.raises(CoordinatorError, match="does not fit its model"):
            open_model(str(tmp_path / "pack"))


def test_a_pack_of_a_pack_has_the_same_trunk(pack: Path, tmp_path: Path) -> None:
    first: Any = open_model(str(pack))
    convert(first, tmp_path / "again", KEEP, workers=1)
    again = open_model(str(tmp_path / "again"))
    assert isinstance(again, PackCheckpoint) and again.pack.matrices == first.pack.matrices
    assert (tmp_path / "again/trunk" / NAME).read_bytes() == (pack / "trunk" / NAME).read_bytes()


def test_a_flipped_bit_is_found(pack: Path, tmp_path: Path) -> None:
    convert(open_model(str(pack)), tmp_path / "copy", KEEP, workers=1)
    file = tmp_path / "copy/trunk" / NAME
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    assert verify(tmp_path / "copy", 1).damaged_files == (NAME,)
    file.write_bytes(raw[:-4096])
    with pytest.raises(CoordinatorError, match="bytes"):
        open_model(str(tmp_path / "copy"))


def test_a_link_out_of_the_pack(pack: Path, tmp_path: Path) -> None:
    convert(open_model(str(pack)), tmp_path / "copy", KEEP, workers=1)
    file = tmp_path / "copy/trunk" / NAME
    shutil.move(file, tmp_path / NAME)
    file.symlink_to(tmp_path / NAME)
    with pytest.raises(CoordinatorError, match=r"matrices.bin is a link that leads out of the pack"):
        open_model(str(tmp_path / "copy"))


def test_without_a_lean_trunk_it_is_one_sentence(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moehive.coordinator.models.lean.families.unknown", lambda _: "the test says so")
    with pytest.raises(CoordinatorError, match="--budget"):
        load_trunk(open_model(str(pack)), 1)


@pytest.mark.parametrize(
    "row",
    [
        ["w", "q4_k", 0, 256],
        ["w", "q4_k", 16, -256],
        ["w", "q4_k", 16, 100],
        ["w", "q4_k", 16, 1 << 30],
        ["w", "bf16", 16, 256],
        ["w", "nonsense", 16, 256],
        ["", "q4_k", 16, 256],
        ["w" * 1000, "q4_k", 16, 256],
        [1, "q4_k", 16, 256],
        ["w", "q4_k", True, 256],
    ],
)
def test_a_manifest_that_lies(row: list[Any]) -> None:
    with pytest.raises(GeometryError):
        checked([row])
    with pytest.raises(GeometryError):
        checked([["w", "q4_k", 16, 256]] * 2)
