"""FP8, MXFP4 and int4: what is stored against transformers' own dequantization, products against torch on it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations import mxfp4
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moehive.kernels.blob import build_blob, decode_tensor
from moehive.kernels.formats.int4_sources import Int4Weights
from moehive.kernels.formats.quantized import (
    QUANTIZED_FORMATS,
    Fp8Format,
    Fp8Weights,
    Int4Format,
    Mxfp4Format,
    Mxfp4Weights,
)
from moehive.kernels.geometry import ExpertSpec, Format, GeometryError, tensor_bytes
from moehive.kernels.native import NativeExperts, kernels
from moehive.kernels.ops import ExpertWeights, load_expert
from moehive.kernels.reference import expert_forward, intermediate

INT4: tuple[Format, ...] = ("int4_g32", "int4_g64", "int4_g128")
ALL: tuple[Format, ...] = (*INT4, "mxfp4", "fp8_block")


def in_eight_bits(x: torch.Tensor) -> torch.Tensor:
    """What the kernels make of a vector: each 32 numbers in steps of their largest / 127."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = padded.abs().amax(2, keepdim=True)
    codes = torch.where(largest > 0, padded * (127 / largest), 0).round()
    return (codes * (largest / 127)).flatten(1)[:, : x.shape[1]]


def empty(name: str, rows: int, columns: int) -> torch.Tensor:
    return torch.empty(tensor_bytes(name, rows, columns), dtype=torch.uint8)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 384), (384, 128)])
def test_fp8_is_what_transformers_dequantizes(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    octets = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    octets[octets & 127 == 127] = 0
    codes = octets.view(torch.float8_e4m3fn)
    scales = torch.rand(rows // 128, columns // 128, generator=generator) / 100
    out = empty("fp8_block", rows, columns)
    Fp8Format().pack(Fp8Weights(codes, scales), out)
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    assert torch.equal(Fp8Format().decode(out, (rows, columns)), wanted)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (16, 3), (37, 2)])
def test_mxfp4_is_what_transformers_dequantizes(rows: int, blocks: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    packed = torch.randint(0, 256, (rows, blocks, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (rows, blocks), generator=generator, dtype=torch.uint8)
    out = empty("mxfp4", rows, 32 * blocks)
    Mxfp4Format().pack(Mxfp4Weights.of_blocks(packed, scales), out)
    wanted = mxfp4.convert_moe_packed_tensors(packed.unsqueeze(0), scales.unsqueeze(0), dtype=torch.float32)[0].T
    assert torch.equal(Mxfp4Format().decode(out, (rows, 32 * blocks)), wanted)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(INT4), st.integers(1, 40), st.integers(1, 300), st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(-80, 12), st.integers(0, 2**31),
)  # fmt: skip
def test_int4_stores_16_bit_scales_exactly(
    name: str, rows: int, columns: int, dtype: torch.dtype, power: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    fmt = Int4Format(name)
    blocks = -(-columns // fmt.group)
    source = Int4Weights.of_codes(
        torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8),
        torch.ldexp(torch.randn(rows, blocks, generator=generator), torch.tensor(power)).to(dtype).float(),
        torch.randint(0, 16, (rows, blocks), generator=generator, dtype=torch.uint8),
        fmt.group,
    )
    out = empty(name, rows, columns)
    fmt.pack(source, out)
    assert torch.equal(fmt.decode(out, (rows, columns)), source.decode())


def test_int4_of_one_group_fits_every_format() -> None:
    source = Int4Weights.of_codes(
        torch.arange(16, dtype=torch.uint8).repeat(5, 12), torch.full((5, 1), 0.5), torch.full((5, 1), 3).byte(), 192
    )
    for name in INT4:
        out = empty(name, 5, 192)
        Int4Format(name).pack(source, out)
        assert torch.equal(Int4Format(name).decode(out, (5, 192)), source.decode())


def test_what_would_lose_something_is_refused() -> None:
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    with pytest.raises(GeometryError, match="16-bit"):
        weights = Int4Weights.of_codes(codes, torch.full((1, 2), 0.1), torch.zeros(1, 2, dtype=torch.uint8), 32)
        Int4Format("int4_g32").pack(weights, empty("int4_g32", 1, 64))
    with pytest.raises(GeometryError, match="can't be stored"):
        weights = Int4Weights.of_codes(codes, torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.uint8), 32)
        Int4Format("int4_g64").pack(weights, empty("int4_g64", 1, 64))
    with pytest.raises(GeometryError, match="not a number"):
        Mxfp4Format().pack(Mxfp4Weights.of_codes(codes, torch.full((1, 2), 255).byte()), empty("mxfp4", 1, 64))
    with pytest.raises(GeometryError, match="NaN"):
        nan = torch.full((1, 64), 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
        Fp8Format().pack(Fp8Weights(nan, torch.ones(1, 1)), empty("fp8_block", 1, 64))


def random_experts(spec: ExpertSpec, count: int) -> list[ExpertWeights]:
    return [
        load_expert(spec, build_blob(spec, {p.name: torch.randn(p.shape) / p.shape[1] ** 0.5 for p in spec.tensors}))
        for _ in range(count)
    ]


def check(spec: ExpertSpec, held: list[ExpertWeights], routing: list[list[int]], native: NativeExperts) -> None:
    """Each pair's row is the reference on the decoded weights; `routing` names each token's experts."""
    x = torch.randn(len(routing), spec.hidden_size)
    numbers = np.array([number for chosen in routing for number in chosen], dtype=np.int64)
    owners = np.repeat(np.arange(len(routing)), [len(chosen) for chosen in routing])
    out = torch.full((len(numbers), spec.hidden_size), torch.nan)
    native.pairs(
        spec, x, np.cumsum([0, *map(len, routing)]).astype(np.uint32),
        np.array([held[number].address for number in numbers], dtype=np.uint64),
        np.ones(len(numbers), dtype=np.float32), out,
    )  # fmt: skip
    for number in set(numbers.tolist()):
        tensors, places = held[number].tensors, np.flatnonzero(numbers == number)
        mine, rows = x[owners[places]], out[places]
        if spec.format == "fp8_block":
            wanted = expert_forward(spec, tensors, mine)
            # A middle between two numbers of bf16 may become the other one: 2^-7 of it.
            off = (rows - wanted).norm(dim=1)
            assert (off <= 2**-7 * (wanted.norm(dim=1) + 0.1)).all()
            assert int((off > 1e-5 * (wanted.norm(dim=1) + 0.1)).sum()) <= 1 + len(off) // 16
            continue
        up, down = (decode_tensor(place, tensors[place.name]).double() for place in spec.tensors)
        between = in_eight_bits(intermediate(spec, in_eight_bits(mine).double() @ up.T).float())
        found = between.double() @ down.T
        terms = between.double().abs() @ down.abs().T
        # A number between the projections may round to the neighbouring one of its 8 bits; at most two do.
        step = between.abs().amax(1, keepdim=True).double() / 127 * down.abs().max()
        assert ((rows - found).abs() <= 1e-4 * terms + 2.02 * step + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ALL), st.integers(1, 300), st.integers(1, 150), st.integers(0, 9), st.integers(1, 3),
    st.sampled_from(kernels()), st.integers(1, 2), st.integers(0, 2**31),
)  # fmt: skip
def test_experts_are_the_reference_on_the_decoded_weights(
    name: Format, hidden: int, middle: int, tokens: int, experts: int, kernel: str, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    spec = ExpertSpec(hidden_size=hidden, intermediate_size=middle, activation="silu", format=name)
    routing = [[token % experts] for token in range(tokens)]
    check(spec, random_experts(spec, experts), routing, NativeExperts(kernel, threads))


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("name", ALL)
def test_more_tokens_than_are_computed_at_once(name: Format, kernel: str) -> None:
    """An expert's tokens are computed in groups of 96."""
    torch.manual_seed(4)
    spec = ExpertSpec(hidden_size=160, intermediate_size=130, activation="silu", format=name)
    held, native = random_experts(spec, 3), NativeExperts(kernel, 2)
    for routing in ([[1]] * 130, [[2, token % 2] for token in range(97)], [[], [0], []], [[], []]):
        check(spec, held, routing, native)


def test_every_format_is_there() -> None:
    assert tuple(QUANTIZED_FORMATS) == ALL
