"""Rows in 8 bits, for slow links: natively, in one pass over memory. Its C side is cpp/rounding.cc."""

import numpy as np
import torch

from .native import library
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


def unround_rows(steps: Buffer, scales: Buffer, rows: int, columns: int) -> torch.Tensor | None:
    """[rows, columns] f32 of the bytes of what `round_rows` gives, whose sizes the caller has checked.

    None: a scale is not finite.
    """
    out = torch.empty((rows, columns), dtype=torch.float32)
    addresses = (np.frombuffer(buffer, np.uint8).ctypes.data for buffer in (steps, scales))
    return out if library().moehive_unround(*addresses, rows, columns, out.data_ptr()) else None
