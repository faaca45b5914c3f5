"""The int4 layouts of checkpoints, packed here word by word as each project publishes it, then unpacked by us."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.kernels.formats.int4_sources import (
    Int4Weights,
    StoredZeros,
    from_awq,
    from_awq_gemv,
    from_compressed_tensors,
    from_gptq,
)
from moehive.kernels.formats.nibbles import turn_nibbles, unpack_nibbles
from moehive.kernels.geometry import GeometryError

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.integers(0, 2**31))


def numbers(rows: int, groups: int, group: int, seed: int, dtype: torch.dtype = torch.float16) -> Int4Weights:
    g = torch.Generator().manual_seed(seed)
    return Int4Weights.of_codes(
        torch.randint(0, 16, (rows, groups * group), generator=g, dtype=torch.uint8),
        torch.rand(rows, groups, generator=g).to(dtype).float(),
        torch.randint(0, 16, (rows, groups), generator=g, dtype=torch.uint8),
        group,
    )


def word(nibbles: list[int]) -> int:
    """Eight codes, the first in the lowest bits, as a signed 32-bit number."""
    total = sum(code << 4 * place for place, code in enumerate(nibbles))
    return total - 2**32 if total >= 2**31 else total


def words(matrix: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Packs along the rows of `matrix`; `order[j]` is the column that place j holds."""
    return torch.tensor(
        [[word([(row + [0] * 8)[at + j] for j in order]) for at in range(0, len(row), 8)] for row in matrix],
        dtype=torch.int32,
    )


def expected(weights: Int4Weights) -> torch.Tensor:
    rows, columns = weights.codes.shape
    out = torch.empty(rows, columns)
    for column in range(columns):
        at = column // weights.group
        codes = weights.codes[:, column].float() - weights.zeros[:, at].float()
        out[:, column] = codes * weights.scales[:, at]
    return out


def same(found: Int4Weights, wanted: Int4Weights) -> None:
    assert found.group == wanted.group
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.zeros, wanted.zeros)
    assert torch.equal(found.scales, wanted.scales)
    assert torch.equal(found.decode(), expected(wanted))


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.sampled_from(["plain", "less_one", "less_one_by_word"]))
def test_gptq(shape: tuple[int, int, int, int], zeros: StoredZeros) -> None:
    octets, groups, group, seed = shape
    wanted = numbers(8 * octets, groups, group, seed)
    stored = words(((wanted.zeros.int() - int(zeros == "less_one")) % 16).T.tolist())
    found = from_gptq(
        words(wanted.codes.tolist()).T,
        stored - 0x11111111 if zeros == "less_one_by_word" else stored,
        wanted.scales.T.half(),
        torch.arange(groups * group, dtype=torch.int32) // group,
        zeros=zeros,
    )
    same(found, wanted)


def test_gptq_out_of_order() -> None:
    wanted = numbers(8, 2, 32, 0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    parts = (
        words(wanted.codes[:, order].tolist()).T, words(wanted.zeros.T.tolist()), wanted.scales.T.half(),
        (order // 32).int(),
    )  # fmt: skip
    assert torch.equal(from_gptq(*parts, zeros="plain", ordered=True).decode(), expected(wanted)[:, order])
    with pytest.raises(GeometryError, match="desc_act is false"):
        from_gptq(*parts, zeros="plain")
    for wrong in (parts[3] + 1, parts[3] - 1, parts[3][:-1]):
        with pytest.raises(GeometryError, match="2 groups for each of 64 columns"):
            from_gptq(*parts[:3], wrong, zeros="plain", ordered=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(0, 3), st.integers(0, 2**31))
def test_words_are_turned_as_a_matrix_of_codes(rows: int, count: int, seed: int) -> None:
    given_words = torch.randint(
        -(2**31), 2**31, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    before = given_words.clone()
    turned = turn_nibbles(given_words)
    assert turned.shape == (-(-rows // 8), 8, count) and torch.equal(given_words, before)
    codes = unpack_nibbles(given_words)
    found = unpack_nibbles(turned.permute(2, 1, 0).flatten(0, 1), rows)
    assert torch.equal(found, codes.T)


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_awq(shape: tuple[int, int, int, int]) -> None:
    octets, groups, group, seed = shape
    wanted = numbers(8 * octets, groups, group, seed)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    found = from_awq(
        words(wanted.codes.T.tolist(), order), words(wanted.zeros.T.tolist(), order), wanted.scales.T.half()
    )
    same(found, wanted)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(0, 2))
def test_awq_gemv(shape: tuple[int, int, int, int], padding: int) -> None:
    octets, groups, group, seed = shape
    wanted = numbers(8 * octets, groups, group, seed)
    room = 8 * (-(-groups // 8) + padding)
    scales, zeros = torch.zeros(8 * octets, room).half(), torch.zeros(8 * octets, room, dtype=torch.uint8)
    scales[:, :groups], zeros[:, :groups] = wanted.scales.half(), wanted.zeros
    same(from_awq_gemv(words(wanted.codes.tolist()), words(zeros.tolist()), scales, group), wanted)
    with pytest.raises(GeometryError, match="in groups of"):
        from_awq_gemv(words(wanted.codes.tolist()), words(zeros.tolist()), scales, 5)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(1, 30), st.booleans())
def test_compressed_tensors(shape: tuple[int, int, int, int], rows: int, symmetric: bool) -> None:
    _, groups, group, seed = shape
    wanted = numbers(rows, groups, group, seed, torch.bfloat16)
    if symmetric:
        wanted.zeros.fill_(8)
    found = from_compressed_tensors(
        words(wanted.codes.tolist()),
        wanted.scales.bfloat16(),
        (rows, groups * group),
        None if symmetric else words(wanted.zeros.T.tolist()).T,
    )
    same(found, wanted)


def test_compressed_tensors_own_packing() -> None:
    wanted = numbers(20, 3, 32, 1, torch.bfloat16)
    found = from_compressed_tensors(
        pack_to_int32((wanted.codes.int() - 8).to(torch.int8), 4),
        wanted.scales.bfloat16(),
        (20, 96),
        pack_to_int32((wanted.zeros.int() - 8).to(torch.int8), 4, packed_dim=0).contiguous(),
    )
    same(found, wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_out_of_order(symmetric: bool) -> None:
    """`actorder: group`, which compressed-tensors wrote before 0.20: it sorts the columns by group, and back."""
    groups, group, rows = 3, 32, 16
    wanted = numbers(rows, groups, group, 2, torch.bfloat16)
    if symmetric:
        wanted.zeros.fill_(8)
    g = torch.Generator().manual_seed(3)
    of_column = (torch.randperm(groups * group, generator=g) // group).int()
    codes, zeros = ((tensor.int() - 8).to(torch.int8) for tensor in (wanted.codes, wanted.zeros))
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group, symmetric=symmetric)
    order = torch.argsort(of_column)
    means = dequantize(x_q=codes[:, order], scale=wanted.scales, zero_point=zeros, args=args)
    means = means[:, torch.argsort(order)]
    parts = (
        pack_to_int32(codes, 4), wanted.scales.bfloat16(), (rows, groups * group),
        None if symmetric else pack_to_int32(zeros, 4, packed_dim=0).contiguous(),
    )  # fmt: skip
    assert torch.equal(from_compressed_tensors(*parts, of_column).decode(), means.float())
    same(from_compressed_tensors(*parts, torch.full_like(of_column, -1)), wanted)
    for wrong in (of_column + 1, of_column - 5, of_column[:-1]):
        with pytest.raises(GeometryError, match="3 groups for each of 96 columns"):
            from_compressed_tensors(*parts, wrong)


def test_shapes_that_do_not_fit_are_refused() -> None:
    wanted = numbers(16, 2, 32, 0)
    packed, zeros, scales = words(wanted.codes.T.tolist()), words(wanted.zeros.T.tolist()), wanted.scales.T.half()
    with pytest.raises(GeometryError, match="scales"):
        from_awq(packed, zeros, scales[:, :8])
    with pytest.raises(GeometryError, match="qzeros"):
        from_awq(packed, zeros[:1], scales)
    with pytest.raises(GeometryError, match="int32"):
        from_awq(packed.long(), zeros, scales)
    with pytest.raises(GeometryError, match="can't hold"):
        from_compressed_tensors(words(wanted.codes.tolist()), wanted.scales, (16, 128))
