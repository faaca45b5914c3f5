"""Random models are read back in the format that was wanted, finite and of a sensible size; GGUFs by gguf-py."""

import math

import gguf
import numpy as np
import pytest
import torch

from moehive.coordinator.bench import random_gguf as module
from moehive.coordinator.bench.random_blocks import GGUF_FORMATS
from moehive.coordinator.bench.random_file import random_file
from moehive.coordinator.bench.random_layouts import LAYOUTS
from moehive.coordinator.bench.random_model import RandomModel
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.estimate.geometries import GEOMETRIES, VOCABULARY, ModelShape
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.precision.forward import Experts, log_probabilities
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.blob import decode_tensor, tensor_views
from moehive.kernels.geometry import ExpertId
from moehive.kernels.ops import ExpertOps


@pytest.fixture
def small(monkeypatch):
    """A geometry as the others are, whose columns fill blocks of 256 but for one matrix."""
    monkeypatch.setattr(module, "VOCABULARY", 4096)
    known = GEOMETRIES["kimi-k2"]
    keys = {
        **known.keys, "attention.head_count": 2, "attention.q_lora_rank": 256, "attention.kv_lora_rank": 256,
        "attention.value_length_mla": 128, "feed_forward_length": 256,
    }  # fmt: skip
    monkeypatch.setitem(GEOMETRIES, "small", ModelShape(known.arch, 3, 512, 8, 4, 256, 512, keys, known.tensors))


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_the_gguf_package_reads_every_format(small, tmp_path, format):
    model = RandomModel(geometry="small", format=format, layers=2, experts=5)
    reader = gguf.GGUFReader(random_file(model, tmp_path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == [tensor.name for tensor in model.tensors()]
    for wanted in model.tensors():
        found = tensors[wanted.name]
        assert tuple(reversed(found.shape.tolist())) == wanted.shape
        numbers = gguf.quants.dequantize(found.data, found.tensor_type).astype(np.float64)
        assert np.isfinite(numbers).all()
        if wanted.matrix:
            kind = format if wanted.shape[-1] % 256 == 0 or not format.endswith(("_k", "_xs")) else "q8_0"
            assert found.tensor_type.name.lower() == kind
            # Of n numbers the standard deviation is known to 1/sqrt(2n), the mean to its own 1/sqrt(n).
            spread, count = wanted.shape[-1] ** -0.5, math.prod(wanted.shape)
            assert numbers.std() == pytest.approx(spread, rel=0.03)
            # Formats with one scale reach a step further down than up: q4_0 from -8 to 7.
            assert abs(numbers.mean()) < spread * (0.15 + 5 / count**0.5)
        elif wanted.name.endswith("norm.weight"):
            assert (numbers == 1).all()
    key = reader.fields["deepseek2.expert_count"]
    assert key.contents() == 5


@pytest.mark.parametrize("format", LAYOUTS)
def test_directories_are_read_in_the_format_that_they_name(small, tmp_path, format):
    source = open_model(str(random_file(RandomModel(geometry="small", format=format, layers=2, experts=5), tmp_path)))
    (layer,) = source.manifest.layers
    names = {"gptq": "int4_g128", "awq": "int4_g128", "int8": "q8_0", "bf16_safetensors": "bf16"}
    wanted = names.get(format, format)
    assert (layer.experts, layer.spec.format, source.computed_as_stored) == (5, wanted, True)
    views = tensor_views(layer.spec, source.expert_blob(ExpertId(0, 4)))
    for place in layer.spec.tensors:
        numbers = decode_tensor(place, views[place.name])
        # MXFP4's scales are powers of two: the nearest is off by a factor of 1.5 at most.
        assert numbers.std() == pytest.approx(numbers.shape[1] ** -0.5, rel=0.5 if format == "mxfp4" else 0.03)
    trunk = load_trunk(source, 1)
    assert isinstance(trunk, LeanTrunk)
    prompt = torch.arange(8)
    (said,) = log_probabilities(trunk, Experts(source.manifest, source.expert_blob, ExpertOps(1), 0), [prompt])
    assert said.shape == (8, VOCABULARY) and said.isfinite().all()


def test_a_file_that_is_there_is_used_and_the_same_anywhere(small, tmp_path):
    model = RandomModel(geometry="small", format="q4_0", layers=2, experts=4)
    path = random_file(model, tmp_path / "a")
    before = path.stat().st_mtime_ns
    assert random_file(model, tmp_path / "a") == path and path.stat().st_mtime_ns == before
    assert random_file(model, tmp_path / "b").read_bytes() == path.read_bytes()


def test_a_write_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tensor", full)
    with pytest.raises(CoordinatorError, match="No space left"):
        random_file(RandomModel(geometry="small", format="q4_0", layers=2), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"geometry": "llama"}, "known are qwen3.5-35b"),
        ({"format": "q9"}, "known are f32"),
        ({"layers": 49}, "1 to 48"),
        ({"experts": 7}, "8 to 128"),
        ({"geometry": "kimi-k2", "layers": 1}, "2 to 61"),
    ],
)
def test_what_cannot_be_is_a_sentence(wrong, sentence):
    with pytest.raises(CoordinatorError, match=sentence):
        RandomModel(**{"geometry": "qwen3-30b", "format": "q4_0", **wrong})
