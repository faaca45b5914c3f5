"""Quantized safetensors against what the project that wrote them says that they mean."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_path import load
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.convert import KEEP, convert
from moehive.coordinator.checkpoints.pack.verify import verify
from moehive.coordinator.models.generic import GenericTrunk
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.geometry import ExpertId

quantizers, reading = (load(Path(__file__).with_name(f"{name}.py")) for name in ("quantizers", "reading"))
Wide = Callable[[str], Path]


@pytest.mark.parametrize("method", list(quantizers.METHODS))
def test_weights_keep_their_bits_and_text_is_transformers_own(method: str, wide: Wide, tmp_path: Path) -> None:
    source = wide("qwen3_moe")
    format = quantizers.METHODS[method][2]
    means = quantizers.write(quantizers.METHODS[method], source, tmp_path / "quantized")
    checkpoint = Checkpoint.open(tmp_path / "quantized")
    assert {layer.spec.format for layer in checkpoint.manifest.layers} == {format or "bf16"}
    assert checkpoint.computed_as_stored == (format is not None)
    for expert in (ExpertId(0, 0), ExpertId(1, 3)):
        found = reading.decoded(checkpoint, expert)
        base = f"model.layers.{expert.layer}.mlp.experts.{expert.expert}"
        up = torch.cat([means[f"{base}.{part}_proj.weight"] for part in ("gate", "up")])
        down = means[f"{base}.down_proj.weight"]
        if format is None:
            up, down = up.bfloat16().float(), down.bfloat16().float()
        torch.testing.assert_close(found["up"], up, rtol=2e-7, atol=0)
        torch.testing.assert_close(found["down"], down, rtol=2e-7, atol=0)
    trunk = checkpoint.trunk_tensors()
    for part in ("q", "k", "v", "o"):
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        matrix = trunk.linear(name)
        assert matrix.format == (format or "bf16")
        wanted = means[name] if format else means[name].bfloat16().float()
        torch.testing.assert_close(matrix.matrix, wanted, rtol=2e-7, atol=0)
    reading.check_text(quantizers.reference(means, source, tmp_path / "reference"), checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_numbers_keep_their_bits(dtype: torch.dtype, wide: Wide, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(wide("qwen3_moe"), dtype=dtype).eval()
    model.save_pretrained(tmp_path / "plain")
    checkpoint = Checkpoint.open(tmp_path / "plain")
    name = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
    assert {layer.spec.format for layer in checkpoint.manifest.layers} == {name} and checkpoint.computed_as_stored
    experts = model.model.layers[1].mlp.experts
    found = reading.decoded(checkpoint, ExpertId(1, 2))
    assert torch.equal(found["up"], experts.gate_up_proj[2].float())
    assert torch.equal(found["down"], experts.down_proj[2].float())
    reading.check_text(model.float(), checkpoint)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_5_moe_text", "glm4_moe"])
def test_fp8_of_other_families(family: str, wide: Wide, tmp_path: Path) -> None:
    source = wide(family)
    means = quantizers.write(quantizers.METHODS["fp8"], source, tmp_path / "quantized")
    checkpoint = Checkpoint.open(tmp_path / "quantized")
    assert {layer.spec.format for layer in checkpoint.manifest.layers} == {"fp8_block"}
    assert isinstance(load_trunk(checkpoint, 1), LeanTrunk)
    reading.check_text(quantizers.reference(means, source, tmp_path / "reference"), checkpoint)


def test_transformers_reads_the_fp8_checkpoint_as_we_do(wide: Wide, tmp_path: Path) -> None:
    quantizers.write(quantizers.METHODS["fp8"], wide("qwen3_moe"), tmp_path / "quantized")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32).eval()
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32
    checkpoint = Checkpoint.open(tmp_path / "quantized")
    found = reading.decoded(checkpoint, ExpertId(1, 2))
    torch.testing.assert_close(found["up"], model.model.layers[1].mlp.experts.gate_up_proj[2].detach())
    reading.check_text(model, checkpoint)


def test_experts_fused_in_one_tensor(wide: Wide, tmp_path: Path) -> None:
    """transformers' own names for FP8 experts: a stack for all, gate above up."""
    quantizers.write(quantizers.METHODS["fp8"], wide("qwen3_moe"), tmp_path / "apart")
    expected = Checkpoint.open(tmp_path / "apart")
    tensors = load_file(tmp_path / "apart" / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        for last in ("weight", "weight_scale_inv"):
            suffix = last.removeprefix("weight")
            each = [[tensors[f"{base}.{e}.{part}_proj.{last}"] for part in ("gate", "up", "down")] for e in range(4)]
            fused[f"{base}.gate_up_proj{suffix}"] = torch.stack([torch.cat(parts[:2]) for parts in each])
            fused[f"{base}.down_proj{suffix}"] = torch.stack([parts[2] for parts in each])
    (tmp_path / "fused").mkdir()
    shutil.copy(tmp_path / "apart" / "config.json", tmp_path / "fused")
    save_file(fused, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    found = Checkpoint.open(tmp_path / "fused")
    assert found.manifest.layers == expected.manifest.layers
    for expert in (ExpertId(0, 1), ExpertId(1, 3)):
        assert torch.equal(found.expert_blob(expert), expected.expert_blob(expert))


@pytest.mark.parametrize("method", ["fp8", "gptq", "int8"])
def test_a_family_without_a_lean_trunk(method: str, wide: Wide, tmp_path: Path) -> None:
    """transformers' own trunk takes the numbers in bf16; the experts keep their bits."""
    source = wide("olmoe")
    means = quantizers.write(quantizers.METHODS[method], source, tmp_path / "quantized")
    checkpoint = Checkpoint.open(tmp_path / "quantized")
    assert {layer.spec.format for layer in checkpoint.manifest.layers} == {quantizers.METHODS[method][2]}
    assert isinstance(load_trunk(checkpoint, 1), GenericTrunk)
    reading.check_text(quantizers.reference(means, source, tmp_path / "reference"), checkpoint)


def test_layers_and_projections_of_different_formats(wide: Wide, tmp_path: Path) -> None:
    """What a recipe leaves out stays bf16: a layer's down projections, an expert's gate, which takes up along."""
    source = wide("qwen3_moe")
    means = quantizers.write(quantizers.METHODS["int4, groups of 32"], source, tmp_path / "quantized")
    file = tmp_path / "quantized" / "model.safetensors"
    tensors, plain = load_file(file), load_file(source / "model.safetensors")
    for name in plain:
        if ("layers.0.mlp.experts" in name and "down_proj" in name) or name.endswith(
            "layers.1.mlp.experts.2.gate_proj.weight"
        ):
            base = name.removesuffix("weight")
            for part in ("weight_packed", "weight_scale", "weight_shape"):
                del tensors[base + part]
            tensors[name], means[name] = plain[name], plain[name].float()
    save_file(tensors, file, {"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "quantized")
    first, second = (layer.spec for layer in checkpoint.manifest.layers)
    assert (first.format, first.back_format) == ("int4_g32", "bf16")
    assert (second.format, second.back_format) == ("bf16", "int4_g32")
    assert not checkpoint.computed_as_stored
    reading.check_text(quantizers.reference(means, source, tmp_path / "reference"), checkpoint)


def refusal(folder: Path) -> str:
    with pytest.raises(CoordinatorError) as caught:
        checkpoint = Checkpoint.open(folder)
        for layer in range(2):
            checkpoint.expert_blob(ExpertId(layer, 0))
        checkpoint.load_trunk()
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes, which is not read"),
        ({"quant_method": 7}, "an unnamed method"),
        ({"quant_method": "gptq", "bits": 3}, "in 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*q_proj": {"bits": 8}}}, "in 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin', which is not read"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "saved as gemm or gemv"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}, "sparse"),
        ({"quant_method": "fp8", "weight_block_size": [0, "x"]}, "weight_block_size"),
    ],
)
def test_methods_that_are_not_read_are_named(section: dict[str, Any], words: str, wide: Wide, tmp_path: Path) -> None:
    shutil.copytree(wide("qwen3_moe"), tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    assert words in refusal(tmp_path / "copy")


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "int4, groups of 128, zero points", "int8", "mxfp4"])
def test_parts_that_are_missing_or_do_not_fit(method: str, wide: Wide, tmp_path: Path) -> None:
    quantizers.write(quantizers.METHODS[method], wide("qwen3_moe"), tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    whole = load_file(file)
    base = "model.layers.0.mlp.experts.0.gate_proj."
    for name in [name for name in whole if name.startswith(base)]:
        if name.endswith((".g_idx", ".weight_zero_point")):
            continue  # may be absent
        save_file({n: t for n, t in whole.items() if n != name}, file, {"format": "pt"})
        assert refusal(tmp_path / "x")
        save_file(whole | {name: torch.cat([whole[name].view(-1), whole[name].view(-1)[:1]])}, file, {"format": "pt"})
        assert refusal(tmp_path / "x")


@pytest.mark.parametrize(
    "method", ["fp8", "gptq", "awq", "int4, groups of 32", "int4, groups of 128, zero points", "mxfp4"]
)
def test_a_pack_of_a_quantized_checkpoint(method: str, wide: Wide, tmp_path: Path) -> None:
    """Copied or in place it has the source's experts and says what the source says, bit by bit."""
    quantizers.write(quantizers.METHODS[method], wide("qwen3_moe"), tmp_path / "x")
    source = Checkpoint.open(tmp_path / "x")
    layers = source.manifest.layers
    experts = [ExpertId(n, expert) for n, layer in enumerate(layers) for expert in range(layer.experts)]
    wanted = reading.logits(source, reading.PROMPT)
    for name, format in (("kept", KEEP), ("in place", None)):
        made = convert(source, tmp_path / name, format, workers=1)
        assert made.in_place == (format is None)
        pack = open_model(str(tmp_path / name))
        assert pack.manifest.layers == layers
        assert {layer.spec.format for layer in layers} == {quantizers.METHODS[method][2]}
        for expert in experts:
            assert torch.equal(pack.expert_blob(expert), source.expert_blob(expert))
        assert torch.equal(reading.logits(pack, reading.PROMPT), wanted)
        found = verify(tmp_path / name, threads=1)
        assert found.damaged == () and found.damaged_files == ()
    # The trunk of the copy keeps its codes and scales, and no expert's.
    stored = Checkpoint.open(tmp_path / "kept" / "trunk", manifest=source.manifest).trunk_stored()
    assert stored.keys() == source.trunk_stored().keys()
    own = load_file(tmp_path / "x" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "kept" / "trunk" / "model.safetensors").items():
        assert ".experts." not in name and tensor.dtype == own[name].dtype
        assert torch.equal(tensor.view(torch.uint8), own[name].view(torch.uint8))
