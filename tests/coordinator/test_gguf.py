"""GGUF files of each family against transformers' own model of the same weights; split and hostile files."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from by_path import load
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moehive.coordinator.checkpoints.gguf.checkpoint import GgufCheckpoint
from moehive.coordinator.checkpoints.gguf.file import open_gguf
from moehive.coordinator.models.base import SequenceInput
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.blob import decode_tensor, tensor_views
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import ExpertId

writer, families = load(Path(__file__).with_name("gguf_writer.py")), load(Path(__file__).with_name("families.py"))
FAMILIES = sorted(writer.ARCHITECTURES)
TOKENS = torch.arange(3, 23)


def model_of(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if model.config.model_type == "qwen3_moe":
        model.config.norm_topk_prob = True  # llama.cpp knows no other
        for layer in model.model.layers:
            layer.mlp.gate.norm_topk_prob = True
    return model


def logits(checkpoint: GgufCheckpoint, backend: Any) -> torch.Tensor:
    trunk = load_trunk(checkpoint, 1)

    async def run() -> torch.Tensor:
        return (await trunk.forward([SequenceInput(TOKENS, trunk.new_cache(), all_logits=True)], backend))[0]

    return asyncio.run(run())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(
    family: str, tiny_moe: Callable[[str], Path], reference_backend: Any, tmp_path: Path
) -> None:
    model = model_of(tiny_moe(family))
    writer.write(model, model.config, tmp_path / "x.gguf")
    checkpoint = GgufCheckpoint.open(tmp_path / "x.gguf")
    assert checkpoint.family == family
    measured = logits(checkpoint, reference_backend(checkpoint))
    assert torch.allclose(measured, model(TOKENS[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_moe_text"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "BF16"])
@torch.no_grad()
def test_weights_keep_the_files_bits(family: str, kind: str, reference_backend: Any, tmp_path: Path) -> None:
    model = wide_model(family)
    writer.write(model, model.config, tmp_path / "x.gguf", kind)
    for parameter in model.parameters():  # what the file means
        if parameter.dim() > 1 and parameter.shape[-1] % 32 == 0:
            quantized = gguf.quantize(parameter.numpy(), gguf.GGMLQuantizationType[kind])
            parameter.copy_(torch.from_numpy(gguf.dequantize(quantized, gguf.GGMLQuantizationType[kind])))
    checkpoint = GgufCheckpoint.open(tmp_path / "x.gguf")
    source, weights = checkpoint.trunk_tensors(), model.state_dict()
    names = [name for name in weights if name.endswith("_proj.weight") and name in source]
    assert len(names) > 8
    for name in names:
        matrix = source.linear(name)
        assert matrix.format == kind.lower()
        decoded = FORMATS[matrix.format].decode(
            FORMATS[matrix.format].view(matrix.blob, (matrix.rows, matrix.columns)), (matrix.rows, matrix.columns)
        )
        order = source.column_order(name)
        assert torch.equal(decoded if order is None else decoded[:, order], weights[name]), name
    experts = model.model.layers[0].mlp.experts
    spec = checkpoint.manifest.layers[0].spec
    views = tensor_views(spec, checkpoint.expert_blob(ExpertId(0, 3)))
    up, down = (decode_tensor(place, views[place.name]) for place in spec.tensors)
    assert spec.format == kind.lower()
    assert torch.equal(up, experts.gate_up_proj[3])
    assert torch.equal(down, experts.down_proj[3])
    measured, expected = logits(checkpoint, reference_backend(checkpoint)), model(TOKENS[None]).logits[0]
    # Activations are rounded to 8 bits or bf16 on the way; a wrong row or sign gives a distance of about 1.
    assert (measured - expected).norm() < 0.05 * expected.norm()


def wide_model(family: str) -> Any:
    """A random model whose rows are whole blocks."""
    values = families.COMMON | families.OVERRIDES[family]
    values |= {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 32}
    values |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "shared_expert_intermediate_size": 32}
    values |= {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
    }  # unlike 4, no order of them is its own inverse
    values |= {"num_experts_per_tok": 8}  # all of them: rounding then moves no token to another expert
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.1)
    return model


def test_a_split_model_is_opened_by_any_of_its_parts(tiny_moe: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_of(tiny_moe("mixtral"))
    writer.write(model, model.config, tmp_path / "x.gguf", split=12)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    prints = {GgufCheckpoint.open(part).manifest.fingerprint for part in parts}
    assert len(prints) == 1
    parts[1].unlink()
    with pytest.raises(CoordinatorError, match="is missing"):
        GgufCheckpoint.open(parts[0])


@pytest.fixture(scope="module")
def small_file(tiny_moe: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    model = model_of(tiny_moe("qwen3_moe"))
    writer.write(model, model.config, path)
    return path


def test_a_truncated_file_is_refused_in_one_sentence(small_file: Path, tmp_path: Path) -> None:
    data = small_file.read_bytes()
    for length in (0, 3, 10, 23, 24, 100, 1000, 5000, len(data) // 2, len(data) - 1):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(data[:length])
        with pytest.raises(CoordinatorError) as caught:
            open_gguf(cut)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(4, 6000), bits=st.integers(1, 255), wide=st.booleans())
def test_a_damaged_header_is_read_or_refused(
    small_file: Path, tmp_path_factory: pytest.TempPathFactory, place: int, bits: int, wide: bool
) -> None:
    data = bytearray(small_file.read_bytes())
    for offset in range(8 if wide else 1):
        data[place + offset] ^= bits
    path = tmp_path_factory.mktemp("hostile") / "x.gguf"
    path.write_bytes(data)
    try:
        GgufCheckpoint.open(path)
    except CoordinatorError as error:
        assert "\n" not in str(error)
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 2}, {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}]
)
def test_metadata_of_other_heads_than_the_tensors(
    change: dict[str, int], tiny_moe: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing is read beyond a tensor's end, and it is said when the model is loaded."""
    model = model_of(tiny_moe("qwen3_moe"))
    for name, value in change.items():
        setattr(model.config, name, value)
    writer.write(model, model.config, tmp_path / "x.gguf")
    with pytest.raises(CoordinatorError, match=r"its config says|do not fit"):
        load_trunk(GgufCheckpoint.open(tmp_path / "x.gguf"), 1)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CoordinatorError, match="no file"):
        open_gguf(tmp_path / "nowhere.gguf")
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CoordinatorError, match="not a GGUF file"):
        open_gguf(tmp_path / "x.gguf")
    with pytest.raises(CoordinatorError, match="not named as a part"):
        open_gguf(tmp_path / "x-00003-of-00002.gguf")
