"""Rows in 8 bits, for slow links: natively, in one pass over memory. Its C side is cpp/rounding.cc."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .native import address, library
from .wire.messages import Buffer

# Columns of a row in 8 bits that share a scale. Hidden states have a few columns far larger than the rest: with one
# scale for a whole row, all others would be rounded away.
SCALE_COLUMNS = 64


def scale_groups(columns: int) -> int:
    """Scales of a row of `columns` numbers in 8 bits."""
    return -(-columns // SCALE_COLUMNS)


def round_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] f32 or bf16 as int8 steps [rows, columns] and their f32 scales [rows, groups].

    The largest number of a group becomes 127. A group with a value that is not finite gets a scale that is not.
    """
    count, columns = rows.shape
    rows = rows.contiguous()
    steps = torch.empty((count, columns), dtype=torch.int8)
    scales = torch.empty((count, scale_groups(columns)), dtype=torch.float32)
    bf16 = rows.dtype is torch.bfloat16
    library().moehive_round(rows.data_ptr(), bf16, count, columns, steps.data_ptr(), scales.data_ptr())
    return steps, scales


class Rounded(NamedTuple):
    """The bytes of what `round_rows` gives; its scales are finite, and the sizes of both are right."""

    steps: Buffer
    scales: Buffer


def unround_rows(rounded: Rounded, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] f32."""
    out = torch.empty((rows, columns), dtype=torch.float32)
    library().moehive_unround(*map(address, rounded), rows, columns, out.data_ptr())
    return out


def add_rounded(parts: Sequence[Rounded], rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """The sum of parts, at least one, each [rows, columns]: added in f32, in their order, then made f32 or bf16.

    Also whether every sum is a number whose square is one, too. No part's numbers are written to
    memory, as `unround_rows` would.
    """
    out = torch.empty((rows, columns), dtype=dtype)
    kind = ctypes.c_void_p * len(parts)
    steps, scales = (kind(*map(address, buffers)) for buffers in zip(*parts, strict=True))
    bf16 = dtype is torch.bfloat16
    return out, bool(library().moehive_add_rounded(steps, scales, len(parts), rows, columns, bf16, out.data_ptr()))
