"""The Triton kernels, on a GPU if there is one, else interpreted, against plain torch on dequantized weights.

Dequantization is gguf's for file types, transformers' for MXFP4, torch's for e4m3 and the definition for int4.
"""

from typing import get_args

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import FP4_VALUES

from moehive.kernels import reference
from moehive.kernels.geometry import ExpertSpec, Format
from moehive.kernels.gpu.experts import GpuExperts
from moehive.kernels.gpu.linear import GpuLinear
from moehive.kernels.gpu.planes import BLOCK_COLUMNS, PlanesError, planes
from moehive.kernels.ops import Reduction

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Source = dict[str, torch.Tensor]
FILE_TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("q8_0", "q4_0", "q4_k", "q6_k")}
# Where the f16 scale factors stand in a block.
FACTORS = {"q8_0": (0,), "q4_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}


def random_source(fmt: str, rows: int, columns: int, seed: int) -> tuple[Source, torch.Tensor]:
    """Random weights in a format, and the f32 [rows, columns] that they mean."""
    rng = np.random.default_rng(seed)
    if fmt in FILE_TYPES:
        block, nbytes = gguf.GGML_QUANT_SIZES[FILE_TYPES[fmt]]
        data = rng.integers(0, 256, (rows, columns // block, nbytes), dtype=np.uint8)
        for at in FACTORS[fmt]:
            scales = rng.uniform(0.001, 0.01, data.shape[:2]).astype(np.float16)
            data[:, :, at : at + 2] = scales[:, :, None].view(np.uint8)
        data = data.reshape(rows, -1)
        return {"rows": torch.from_numpy(data)}, torch.from_numpy(gguf.dequantize(data, FILE_TYPES[fmt]))
    if fmt in ("f32", "bf16", "f16"):
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[fmt]
        values = torch.from_numpy(rng.standard_normal((rows, columns), dtype=np.float32) * 0.1).to(dtype)
        return {"values": values}, values.float()
    if fmt == "fp8_block":
        values = torch.from_numpy(rng.standard_normal((rows, columns), dtype=np.float32)).to(torch.float8_e4m3fn)
        scales = torch.from_numpy(rng.uniform(0.05, 0.2, (-(-rows // 128), -(-columns // 128))).astype(np.float32))
        wide = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        return {"values": values, "scales": scales}, values.float() * wide
    codes = torch.from_numpy(rng.integers(0, 16, (rows, columns), dtype=np.uint8))
    if fmt == "mxfp4":
        powers = torch.from_numpy(rng.integers(120, 125, (rows, columns // 32), dtype=np.uint8))
        wide = torch.exp2(powers.float() - 127).repeat_interleave(32, 1)
        return {"values": codes, "scales": powers}, torch.tensor(FP4_VALUES)[codes.long()] * wide
    group = BLOCK_COLUMNS[fmt]
    small = rng.choice([1.0, 2.0**-30], (rows, columns // group))  # smaller than an f16, as a bf16 may be
    scales = torch.from_numpy(rng.uniform(0.01, 0.05, small.shape) * small).bfloat16().float()
    zeros = torch.from_numpy(rng.integers(0, 16, (rows, columns // group), dtype=np.uint8))
    wide_zeros, wide = zeros.repeat_interleave(group, 1), scales.repeat_interleave(group, 1)
    return {"values": codes, "scales": scales, "zeros": zeros}, (codes.float() - wide_zeros.float()) * wide


def tolerance(fmt: str, terms: torch.Tensor, tokens: int) -> torch.Tensor:
    """How far a sum may be off whose terms' absolute values add up to `terms`.

    f32 throughout for one vector; else weights and vectors are cut to bf16 (the interpreter rounds down: 2^-7).
    """
    exact = fmt == "f32" or tokens == 1
    return terms * (2e-6 if exact else 2.02 * 2.0**-7) + 1e-5


@pytest.mark.parametrize("fmt", BLOCK_COLUMNS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 70])  # 70: a tile of 64, and one that is not full
def test_linear(fmt: str, tokens: int) -> None:
    rows, columns = 70, max(2 * BLOCK_COLUMNS[fmt], 96)
    source, weights = random_source(fmt, rows, columns, seed=tokens)
    bias = torch.randn(rows)
    x = torch.randn(tokens, columns)
    out = GpuLinear(fmt, rows, columns, source, bias, DEVICE)(x.to(DEVICE)).cpu()
    assert out.shape == (tokens, rows)
    bound = tolerance(fmt, x.abs() @ weights.abs().T, tokens)
    assert ((out - (x @ weights.T + bias)).abs() <= bound).all()


@pytest.mark.parametrize("fmt", BLOCK_COLUMNS)
@settings(max_examples=4, deadline=None)
@given(rows=st.integers(1, 100), columns=st.integers(1, 300), tokens=st.integers(1, 20))
def test_linear_of_odd_sizes(fmt: str, rows: int, columns: int, tokens: int) -> None:
    step = 1 if fmt == "fp8_block" else BLOCK_COLUMNS[fmt]  # whose last block may be cut
    columns = -(-columns // step) * step
    source, weights = random_source(fmt, rows, columns, seed=rows)
    x = torch.randn(tokens, columns)
    out = GpuLinear(fmt, rows, columns, source, None, DEVICE)(x.to(DEVICE)).cpu()
    assert ((out - x @ weights.T).abs() <= tolerance(fmt, x.abs() @ weights.abs().T, tokens)).all()


def test_every_e4m3_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    values = codes.view(torch.float8_e4m3fn)
    layer = GpuLinear("fp8_block", 256, 1, {"values": values, "scales": torch.ones(2, 1)}, None, DEVICE)
    out = layer(torch.ones(1, 1, device=DEVICE)).cpu()[0]
    assert torch.equal(out.nan_to_num(999.0), values.float()[:, 0].nan_to_num(999.0))


def _random_expert(spec: ExpertSpec, gpu: GpuExperts, seed: int):  # type: ignore[no-untyped-def]
    up, up_weights = random_source(spec.format, spec.projected_size, spec.hidden_size, seed)
    down, down_weights = random_source(spec.back_format, spec.hidden_size, spec.intermediate_size, seed + 1)
    floats: Source = {}
    generator = torch.Generator().manual_seed(seed)
    if spec.bias:
        floats = {
            "up_bias": torch.randn(spec.projected_size, generator=generator),
            "down_bias": torch.randn(spec.hidden_size, generator=generator),
        }
    if spec.post_norm_eps is not None:
        floats["post_norm"] = torch.rand(spec.hidden_size, generator=generator) + 0.5
    return gpu.load(spec, up, down, floats), (up_weights, down_weights, floats)


def _expected(spec: ExpertSpec, weights, x: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    up, down, floats = weights
    middle = reference.intermediate(spec, torch.nn.functional.linear(x, up, floats.get("up_bias")))
    y = torch.nn.functional.linear(middle, down, floats.get("down_bias"))
    return reference.post_norm(spec, floats, y)


ROUTINGS = {
    "one token": [[3, 0, 2]],
    "all to one expert": [[1]] * 20,
    "uneven": [[0, 1], [1], [], [2, 1, 0], [1, 3]],
    "none": [[], []],
}
SEVERAL_TILES = {  # of one expert
    "tiles of 64": [[1]] * 70,
    "tiles of 16": [[0, 1], [0, 2], [3, 0], *[[0]] * 37],
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("fmt", [name for name in BLOCK_COLUMNS if name in get_args(Format)])
def test_experts_in_each_format(fmt: str, routing: str) -> None:
    size = max(64, BLOCK_COLUMNS[fmt])
    spec = ExpertSpec(hidden_size=size, intermediate_size=size, activation="silu", format=fmt)  # type: ignore[arg-type]
    check(spec, ROUTINGS[routing], Reduction.PARTIAL_SUM)


@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("routing", ROUTINGS | SEVERAL_TILES)
def test_routings(routing: str, reduction: Reduction) -> None:
    check(
        ExpertSpec(hidden_size=64, intermediate_size=70, activation="silu", format="f32"),
        (ROUTINGS | SEVERAL_TILES)[routing],
        reduction,
    )


@pytest.mark.parametrize("routing", SEVERAL_TILES)
def test_several_tiles_of_block_formats(routing: str) -> None:
    spec = ExpertSpec(hidden_size=32, intermediate_size=32, activation="silu", format="q4_0")
    check(spec, SEVERAL_TILES[routing], Reduction.PER_EXPERT)


@pytest.mark.parametrize(
    "spec",
    [
        ExpertSpec(hidden_size=96, intermediate_size=48, activation="gelu", format="f32", bias=True),
        ExpertSpec(hidden_size=96, intermediate_size=50, activation="gelu_tanh", format="f32", limit=0.5),
        ExpertSpec(
            hidden_size=64, intermediate_size=48, activation="silu", format="f32", alpha=1.702, limit=0.4,
            up_offset=1.0, bias=True,
        ),
        ExpertSpec(
            hidden_size=64, intermediate_size=48, activation="silu", format="f32", limit=0.3,
            limit_after_activation=True,
        ),
        ExpertSpec(hidden_size=40, intermediate_size=33, activation="relu2", gated=False, format="f32"),
        ExpertSpec(hidden_size=40, intermediate_size=34, activation="relu", format="f32", post_norm_eps=1e-6),
        ExpertSpec(hidden_size=256, intermediate_size=256, activation="silu", format="q4_k", down_format="q6_k"),
    ],
    ids=lambda spec: f"{spec.activation}-{spec.format}-{spec.intermediate_size}",
)  # fmt: skip
def test_what_experts_compute(spec: ExpertSpec) -> None:
    check(spec, ROUTINGS["uneven"], Reduction.PARTIAL_SUM)
    check(spec, ROUTINGS["one token"], Reduction.PER_EXPERT)


def check(spec: ExpertSpec, tokens: list[list[int]], reduction: Reduction) -> None:
    gpu = GpuExperts(DEVICE)
    made = [_random_expert(spec, gpu, seed) for seed in range(4)]
    held = {number: expert for number, (expert, _) in enumerate(made)}
    pairs = [(token, number) for token, numbers in enumerate(tokens) for number in numbers]
    weights = np.random.default_rng(7).uniform(0.1, 1.0, len(pairs)).astype(np.float32)
    hidden = torch.randn(len(tokens), spec.hidden_size, generator=torch.Generator().manual_seed(3))
    offsets = np.cumsum([0, *map(len, tokens)]).astype(np.uint32)
    numbers = np.array([number for _, number in pairs], dtype=np.uint32)
    out = gpu.moe_layer(spec, held, hidden, offsets, numbers, weights, reduction).cpu()

    rows = torch.zeros(len(pairs), spec.hidden_size)
    for place, (token, number) in enumerate(pairs):
        rows[place] = weights[place] * _expected(spec, made[number][1], hidden[token : token + 1])[0]
    if reduction is Reduction.PARTIAL_SUM:
        owners = torch.tensor([token for token, _ in pairs], dtype=torch.long)
        rows = torch.zeros(len(tokens), spec.hidden_size).index_add(0, owners, rows)
    assert out.shape == rows.shape
    # Each of three products loses up to 2^-6 of its terms where numbers are cut to bf16 (see `tolerance`).
    scale = rows.abs().max().item() if len(rows) else 0.0
    exact = spec.format == "f32" or max(map(len, tokens), default=0) == len(pairs) == len({n for _, n in pairs})
    assert torch.allclose(out, rows, rtol=0, atol=scale * (1e-5 if exact else 5e-2) + 1e-6)


def test_an_expert_that_is_not_held_is_named() -> None:
    spec = ExpertSpec(hidden_size=8, intermediate_size=8, activation="silu", format="f32")
    one = np.array([5], dtype=np.uint32)
    with pytest.raises(KeyError, match="5"):
        GpuExperts(DEVICE).moe_layer(
            spec, {}, torch.zeros(1, 8), np.array([0, 1], dtype=np.uint32), one, np.ones(1, np.float32),
            Reduction.PARTIAL_SUM,
        )  # fmt: skip


def test_a_format_without_a_kernel_is_refused() -> None:
    with pytest.raises(PlanesError, match="q2_k"):
        planes("q2_k", 1, 256)
