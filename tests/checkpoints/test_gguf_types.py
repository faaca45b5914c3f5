"""GGUF files whose matrices are of every type, mixed by tensor and layer, in one file or split: the gguf package's
own numbers, and transformers' text on them. What no kernel computes in is rounded to bf16.

Most types can't be quantized by the package, so the blocks are random bits with scales of the right size; what they
mean is the package's own dequantization.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from by_path import load
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moehive.coordinator.checkpoints.gguf.checkpoint import GgufCheckpoint
from moehive.kernels.geometry import ExpertId

HERE = Path(__file__).parent
families, writer = (load(HERE.parent / "coordinator" / f"{name}.py") for name in ("families", "gguf_writer"))
Type = gguf.GGMLQuantizationType
# Where the f16 scales of a block lie; an MXFP4 block begins with a power of two.
SCALES: dict[str, tuple[int, ...]] = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip
# Of types that no kernel computes in. An IQ1_M block has its scale in four pieces.
EXPANDED: dict[str, tuple[int, ...]] = {
    "IQ1_S": (0,), "IQ1_M": (), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [..., bytes of a row] of random bits whose numbers deviate by some 0.06, and these numbers in f32.

    Numbers of a type that no kernel computes in are rounded to bf16.
    """
    columns, nbytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // columns, nbytes), dtype=np.uint8)
    places = (SCALES | EXPANDED)[kind]

    def means(scale: float) -> np.ndarray:
        if kind == "MXFP4":
            raw[..., 0] = rng.integers(119, 122, raw.shape[:-1])
        if kind == "IQ1_M":  # the upper 4 bits of each 16, the lowest first
            pieces = int(np.float16(scale).view(np.uint16)) >> np.arange(0, 16, 4) & 15
            raw[..., 49::2] = raw[..., 49::2] & 15 | pieces.astype(np.uint8) << 4
        for at in places:
            raw[..., at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        if len(places) == 2 and kind in ("Q4_1", "Q5_1"):  # a minimum, not a factor of one
            raw[..., 2:4] = np.frombuffer(np.float16(-8 * scale).tobytes(), np.uint8)
        flat = raw.reshape(*shape[:-1], -1)
        return gguf.dequantize(flat, Type[kind]).reshape(shape)

    numbers = means(0.01)
    numbers = means(0.01 * 0.06 / float(numbers.std()))
    if kind in EXPANDED:
        numbers = torch.from_numpy(numbers).bfloat16().float().numpy()
    return raw.reshape(*shape[:-1], -1), numbers


def make(kinds: Callable[[str], str], path: Path, split: int = 0) -> tuple[Any, dict[str, str]]:
    """Writes a file whose matrices are of `kinds(name)`; transformers' model of the same numbers, and the types."""
    values = families.COMMON | {
        "hidden_size": 256,
        "moe_intermediate_size": 256,
        "head_dim": 64,
        "norm_topk_prob": True,
    }
    values |= {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 4, "intermediate_size": 256}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"](**values), dtype=torch.float32).eval()
    used: dict[str, str] = {}
    means: dict[str, np.ndarray] = {}

    def encode(name: str, data: np.ndarray) -> tuple[np.ndarray, Any]:
        if name.endswith("ffn_gate_inp.weight"):  # routers are never quantized
            means[name] = data
            return data, Type.F32
        used[name] = kinds(name)
        raw, means[name] = random_blocks(used[name], data.shape, len(used))
        return raw, Type[used[name]]

    writer.write(model, model.config, path, split=split, encode=encode)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            block = f"blk.{name.split('.')[2]}" if ".layers." in name else ""
            if name.endswith("experts.gate_up_proj"):
                gate, up = (torch.from_numpy(means[f"{block}.ffn_{part}_exps.weight"]) for part in ("gate", "up"))
                parameter.copy_(torch.cat([gate, up], 1))
            elif name.endswith("experts.down_proj"):
                parameter.copy_(torch.from_numpy(means[f"{block}.ffn_down_exps.weight"]))
            elif parameter.dim() > 1:
                stored = names.get_name(name, try_suffixes=(".weight",))
                parameter.copy_(torch.from_numpy(means[str(stored)]))
    return model, used


def computed_as(kind: str) -> str:
    return "bf16" if kind in EXPANDED else kind.lower()


def check(model: Any, checkpoint: GgufCheckpoint, used: dict[str, str], reading: ModuleType) -> None:
    trunk = checkpoint.trunk_tensors()
    for part, stored in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
        for layer in range(2):
            matrix = trunk.linear(f"model.layers.{layer}.self_attn.{part}_proj.weight")
            assert matrix.format == computed_as(used[f"blk.{layer}.{stored}.weight"])
            expected = getattr(model.model.layers[layer].self_attn, f"{part}_proj").weight
            torch.testing.assert_close(matrix.matrix, expected.detach(), rtol=1e-6, atol=1e-7)
    for layer in range(2):
        spec = checkpoint.manifest.layers[layer].spec
        assert spec.back_format == computed_as(used[f"blk.{layer}.ffn_down_exps.weight"])
        found = reading.decoded(checkpoint, ExpertId(layer, 3))
        experts = model.model.layers[layer].mlp.experts
        torch.testing.assert_close(found["up"], experts.gate_up_proj[3].detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found["down"], experts.down_proj[3].detach(), rtol=1e-6, atol=1e-7)
    reading.check_text(model, checkpoint)


@pytest.mark.parametrize("kind", [*sorted(SCALES), *sorted(EXPANDED)])
def test_every_type_from_a_file(kind: str, tmp_path: Path, reading: ModuleType) -> None:
    model, used = make(lambda _: kind, tmp_path / "x.gguf")
    checkpoint = GgufCheckpoint.open(tmp_path / "x.gguf")
    assert {layer.spec.format for layer in checkpoint.manifest.layers} == {computed_as(kind)}
    assert checkpoint.computed_as_stored == (kind in SCALES)
    check(model, checkpoint, used, reading)


def test_types_mixed_by_tensor_and_layer_in_a_split_file(tmp_path: Path, reading: ModuleType) -> None:
    """As dynamic quantizations mix them; an expert's gate and up are of one type, and down of another."""
    cycle = iter(sorted(SCALES) * 4)
    chosen: dict[str, str] = {}

    def kinds(name: str) -> str:
        key = name.replace("ffn_up_exps", "ffn_gate_exps")
        return chosen.setdefault(key, next(cycle))

    model, used = make(kinds, tmp_path / "x.gguf", split=7)
    parts = sorted(tmp_path.glob("x-*-of-*.gguf"))
    assert len(parts) > 2
    checkpoint = GgufCheckpoint.open(parts[1])
    assert len({checkpoint.manifest.layers[n].spec.format for n in range(2)}) == 2
    check(model, checkpoint, used, reading)
