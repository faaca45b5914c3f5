"""Block formats: the layout against gguf's own dequantization, products against torch on the same numbers."""

from dataclasses import replace
from typing import get_args

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moehive.kernels.blob import empty_blob, pack_blob
from moehive.kernels.formats.file_rows import FILE_FORMATS, pack_file_rows
from moehive.kernels.formats.int4_sources import Int4Weights
from moehive.kernels.formats.quantized import Int4Format
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import (
    BLOCKS,
    FLOAT_FORMATS,
    ROUNDED_FORMATS,
    ExpertSpec,
    Format,
    GeometryError,
    tensor_bytes,
)
from moehive.kernels.library import NativeLibraryError
from moehive.kernels.linear import LinearOps, LinearWeights
from moehive.kernels.native import NativeExperts, kernels
from moehive.kernels.ops import ExpertOps, Reduction, load_expert
from moehive.kernels.reference import as_multiplied, intermediate
from moehive.kernels.rows import block_rows, file_rows

# Where a block's f16 factors stand; all other bytes may be anything.
FACTORS = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "iq4_nl": (0,), "q2_k": (80, 82),
    "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_xs": (0,), "mxfp4": (),
}  # fmt: skip
INT4_FORMATS = ("int4_g32", "int4_g64", "int4_g128")
every_format = pytest.mark.parametrize("name", FACTORS)


def random_rows(name: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """A file's rows with random codes and factors of about 0.01, uint8 [rows, bytes of a row]."""
    block, nbytes = BLOCKS[name]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, -(-columns // block), nbytes), dtype=np.uint8)
    for at in FACTORS[name]:
        factors = rng.uniform(-0.01, 0.01, data.shape[:2]).astype(np.float16)
        data[:, :, at : at + 2] = factors[:, :, None].view(np.uint8)
    if name == "mxfp4":  # a power of two, plus 127
        data[:, :, 0] = rng.integers(118, 123, data.shape[:2])
    return torch.from_numpy(data.reshape(rows, -1))


def meant(name: str, rows: torch.Tensor) -> torch.Tensor:
    """What gguf says that a file's rows mean, f32."""
    return torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name.upper()]))


def pack(name: str, rows: torch.Tensor, columns: int) -> torch.Tensor:
    out = torch.empty(tensor_bytes(name, len(rows), columns), dtype=torch.uint8)
    pack_file_rows(name, rows, columns, out)
    return out


def in_eight_bits(x: torch.Tensor) -> torch.Tensor:
    """What the kernels make of a vector: each 32 numbers in steps of their largest / 127."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = padded.abs().amax(2, keepdim=True)
    # 127 as a tensor: torch computes `127 / largest` as a reciprocal times 127, which rounds twice.
    codes = torch.where(largest > 0, padded * (torch.full_like(largest, 127) / largest), 0).round()
    return (codes * (largest / torch.full_like(largest, 127))).flatten(1)[:, : x.shape[1]]


def close(found: torch.Tensor, weights: torch.Tensor, x: torch.Tensor, zero: float = 0.0) -> None:
    """`found` is x @ weights.T: exactly for x in 8 bits, but for f32 sums; and as near to x as 8 bits are.

    `zero`: the largest product of a zero point and its scale. A weight that is 0 is then a product and what takes it
    away again, each rounded to 24 bits, and so are their sums.
    """
    eight = in_eight_bits(x).double()
    rounding = 1e-5 * (eight.abs() @ weights.double().abs().T) + 1e-6
    rounding += 2**-22 * zero * eight.abs().sum(1, keepdim=True)
    assert ((found - eight @ weights.double().T).abs() <= rounding).all()
    half_step = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32)).abs().amax(2) / 254
    bound = half_step.repeat_interleave(32, 1)[:, : x.shape[1]].double() @ weights.double().abs().T
    assert ((found - x.double() @ weights.double().T).abs() <= 1.001 * bound + rounding).all()


@every_format
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_decoding_has_the_bits_of_gguf(name: str, rows: int) -> None:
    columns = 3 * BLOCKS[name][0]
    source = random_rows(name, rows, columns, seed=rows)
    numbers = FORMATS[name].decode(pack(name, source, columns), (rows, columns))
    assert torch.equal(numbers, meant(name, source))


def test_every_file_format_is_tested() -> None:
    assert tuple(FACTORS) == FILE_FORMATS


def test_an_mxfp4_scale_that_is_no_number_is_refused() -> None:
    nan = random_rows("mxfp4", 2, 64, 0)
    nan[1, 17] = 255
    with pytest.raises(GeometryError, match="not a number"):
        pack("mxfp4", nan, 64)


@every_format
def test_a_row_of_other_bytes_is_refused(name: str) -> None:
    columns = BLOCKS[name][0]
    with pytest.raises(GeometryError, match=f"in {name} has"):
        pack(name, random_rows(name, 2, columns, 0)[:, 1:], columns)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_encoding_is_that_of_gguf(name: str) -> None:
    numbers = torch.randn(20, 64)
    out = torch.empty(tensor_bytes(name, 20, 64), dtype=torch.uint8)
    FORMATS[name].encode(numbers, out)
    wanted = torch.from_numpy(gguf.quantize(numbers.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    assert torch.equal(out, pack(name, wanted, 64))


@pytest.mark.parametrize("name", get_args(Format))
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 600), tokens=st.one_of(st.integers(0, 9), st.integers(31, 70)),
    bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@example(rows=37, columns=300, tokens=70, bias=True, seed=0)  # 32 are computed at once
def test_linear(name: Format, rows: int, columns: int, tokens: int, bias: bool, seed: int) -> None:
    """Against the product with what the weights mean: gguf says it of a file's rows, of others their decoding."""
    generator = torch.Generator().manual_seed(seed)
    if name in FACTORS:
        columns = -(-columns // BLOCKS[name][0]) * BLOCKS[name][0]
        source = random_rows(name, rows, columns, seed)
        weights, matrix = LinearWeights(name, rows, columns, pack(name, source, columns)), meant(name, source)
    else:
        blob = empty_blob(tensor_bytes(name, rows, columns))
        if name in INT4_FORMATS:
            group = BLOCKS[name][0]
            codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
            scales = torch.rand(rows, -(-columns // group), generator=generator).half().float()
            zeros = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
            Int4Format(name).pack(Int4Weights.of_codes(codes, scales, zeros, group), blob)
        else:
            FORMATS[name].encode(torch.randn(rows, columns, generator=generator), blob)
        weights = LinearWeights(name, rows, columns, blob)
        matrix = weights.matrix
    x = torch.randn(tokens, columns, generator=generator)
    added = torch.randn(rows, generator=generator) if bias else torch.zeros(rows)
    if bias:
        weights = replace(weights, bias=added)
    found = LinearOps(2).linear(weights, x) - added
    if name in (*FLOAT_FORMATS, *ROUNDED_FORMATS):
        terms = x.double().abs() @ matrix.double().abs().T + added.abs()
        assert ((found - as_multiplied(name, x).double() @ matrix.double().T).abs() <= 1e-5 * terms).all()
        half_step = 2**-8 if name in ROUNDED_FORMATS else 0
        assert ((found - x.double() @ matrix.double().T).abs() <= (half_step + 1e-5) * terms).all()
    else:
        close(found, matrix, x, zero=15.0 if name in INT4_FORMATS else 0.0)


@every_format
def test_no_token_depends_on_its_company(name: str) -> None:
    source = random_rows(name, 150, 512, 1)
    weights = LinearWeights(name, 150, 512, pack(name, source, 512))  # type: ignore[arg-type]
    x = torch.randn(70, 512)
    ops = LinearOps(2)
    together = ops.linear(weights, x)
    assert torch.equal(together, torch.cat([ops.linear(weights, row[None]) for row in x]))
    close(together, meant(name, source), x)


def test_matrices_of_different_formats_share_an_input() -> None:
    kinds: tuple[Format, ...] = ("q4_0", "f32", "q6_k")
    x, ops = torch.randn(3, 256), LinearOps(1)
    weights = []
    for seed, kind in enumerate(kinds):
        if kind == "f32":
            weights.append(LinearWeights(kind, 20, 256, torch.randn(20 * 256).view(torch.uint8)))
        else:
            weights.append(LinearWeights(kind, 20, 256, pack(kind, random_rows(kind, 20, 256, seed), 256)))
    assert torch.equal(ops.linears(weights, x), torch.cat([ops.linear(one, x) for one in weights], 1))


def test_zeros_and_what_is_no_number() -> None:
    source = random_rows("q4_0", 16, 64, 0)
    weights = LinearWeights("q4_0", 16, 64, pack("q4_0", source, 64))
    assert (LinearOps(1).linear(weights, torch.full((1, 64), 1e-38)).abs() < 1e-29).all()
    x = torch.zeros(3, 64)
    x[1, 40] = float("nan")
    x[2, 3] = float("inf")
    found = LinearOps(1).linear(weights, x)
    assert (found[0] == 0).all() and found[1].isnan().all() and found[2].isnan().all()


ROUTINGS = {
    "one token": [[3, 0, 2]],
    "all to one expert": [[1]] * 98,
    "uneven": [[0, 1], [1], [], [2, 1, 0], [1, 3]],
    "none": [[], []],
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("up", "down", "gated"),
    [
        *((name, name, True) for name in FACTORS),
        ("q4_k", "q6_k", True), ("f32", "q8_0", True), ("q8_0", "bf16", False), ("q5_k", "q4_0", False),
    ],
)  # fmt: skip
def test_experts(up: Format, down: Format, gated: bool, routing: str) -> None:
    middle = max(BLOCKS.get(down, (40, 0))[0], 40)  # 40: gate and up end within a group of rows
    spec = ExpertSpec(
        hidden_size=256,
        intermediate_size=middle,
        activation="silu",
        gated=gated,
        bias=True,
        format=up,
        down_format=down,
    )
    held, numbers = {}, {}
    for number in range(4):
        rows, floats, wide = {}, {}, {}
        generator = torch.Generator().manual_seed(number)
        for place in spec.tensors:
            if place.format in BLOCKS:
                source = random_rows(place.format, place.shape[0], place.shape[1], seed=number)
                rows[place.name] = source.chunk(place.matrices)
                wide[place.name] = meant(place.format, source)[:, : place.shape[1]]
            else:
                floats[place.name] = wide[place.name] = (
                    torch.randn(place.shape, generator=generator).bfloat16().float()
                )
        held[number] = load_expert(spec, pack_blob(spec, rows, floats))
        numbers[number] = wide
    tokens = ROUTINGS[routing]
    pairs = [(token, number) for token, chosen in enumerate(tokens) for number in chosen]
    factors = np.random.default_rng(5).uniform(0.1, 1, len(pairs)).astype(np.float32)
    hidden = torch.randn(len(tokens), 256, generator=torch.Generator().manual_seed(9))
    offsets = np.cumsum([0, *map(len, tokens)]).astype(np.uint32)
    chosen = np.array([number for _, number in pairs], dtype=np.uint32)
    found = {"ops": ExpertOps(2).moe_layer(spec, held, hidden, offsets, chosen, factors, Reduction.PER_EXPERT)}
    for kernel in kernels():  # each that this processor runs; what no instruction set helps is the last
        found[kernel] = torch.full((len(pairs), 256), float("nan"))
        addresses = np.array([held[number].address for _, number in pairs], dtype=np.uint64)
        NativeExperts(kernel, 2).pairs(spec, hidden, offsets, addresses, factors, found[kernel])
    for at, ((token, number), factor) in enumerate(zip(pairs, factors, strict=True)):
        wide = numbers[number]
        x = hidden[token : token + 1]
        if up in BLOCKS:
            x = in_eight_bits(x)
        between = intermediate(spec, x @ wide["up"].T + wide["up_bias"])
        exact = in_eight_bits(between) if down in BLOCKS else as_multiplied(down, between)
        wanted = (exact @ wide["down"].T + wide["down_bias"])[0] * factor
        # A number beside the middle of two steps may round the other way: one step of its 32, for each such number.
        steps = 127 if down in BLOCKS else 128
        step = (between.abs().amax() / steps * wide["down"].abs().amax()).item() if down != "f32" else 0.0
        bound = 1e-4 * wanted.abs().max().item() + 2 * step
        for kernel, rows in found.items():
            assert torch.allclose(rows[at], wanted, rtol=1e-4, atol=bound), kernel


IDS = torch.tensor([0, 36, 17, 16, 17])


@every_format
def test_single_rows_of_a_table(name: Format) -> None:
    """As a file has them, and laid out as kernels compute."""
    source = random_rows(name, 37, 512, 3)
    expected = meant(name, source)[IDS]
    torch.testing.assert_close(file_rows(name, source, 512, IDS), expected, rtol=1e-6, atol=0)
    table = LinearWeights(name, 37, 512, pack(name, source, 512))
    assert torch.equal(block_rows(table, IDS), file_rows(name, source, 512, IDS))


@pytest.mark.parametrize("name", ["int4_g32", "int4_g64", "int4_g128", "fp8_block"])
def test_single_rows_that_no_file_has(name: Format) -> None:
    blob = torch.empty(tensor_bytes(name, 37, 400), dtype=torch.uint8)
    FORMATS[name].encode(torch.randn(37, 400, generator=torch.Generator().manual_seed(1)), blob)
    table = LinearWeights(name, 37, 400, blob)
    torch.testing.assert_close(block_rows(table, IDS), table.matrix[IDS], rtol=1e-6, atol=0)


def test_rows_that_a_table_lacks_are_refused() -> None:
    table = LinearWeights("q4_0", 37, 64, pack("q4_0", random_rows("q4_0", 37, 64, 0), 64))
    for wrong in (-1, 37):
        with pytest.raises(NativeLibraryError, match="does not have"):
            block_rows(table, torch.tensor([0, wrong]))
