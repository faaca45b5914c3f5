"""Rows in 8 bits are added up with the bits that torch gives of them, one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moehive.proto.rounding import Rounded, add_rounded, round_rows, unround_rows
from moehive.proto.tensors import tensor_buffer

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
COLUMNS = st.integers(1, 200) | st.sampled_from([2047, 2048, 2049, 2112, 4159])  # about what is added up at once


def rounded(rows: torch.Tensor) -> Rounded:
    steps, scales = round_rows(rows)
    return Rounded(tensor_buffer(steps), bytes(tensor_buffer(scales)))


@given(st.integers(1, 5), st.integers(1, 3), COLUMNS, DTYPES, st.integers(0, 2**32))
def test_parts_are_added_in_f32_in_their_order(
    number: int, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-6, 6, (number, rows, 1), generator=generator)
    values = torch.randn(number, rows, columns, generator=generator) * sizes
    parts = [rounded(part) for part in values]
    first, *others = (unround_rows(part, rows, columns) for part in parts)
    for other in others:
        first += other
    total, finite = add_rounded(parts, rows, columns, dtype)
    assert finite and total.dtype is dtype
    assert total.view(torch.uint8).equal(first.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("columns", [64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_that_is_no_number_is_found_wherever_it_is(columns: int, dtype: torch.dtype) -> None:
    for place in range(columns):
        part = torch.ones(2, columns)
        part[1, place] = 2e38
        total, finite = add_rounded([rounded(part)] * 2, 2, columns, dtype)
        assert not finite and torch.isinf(total).sum() == 1
        assert add_rounded([rounded(torch.ones(2, columns))] * 2, 2, columns, dtype)[1]
