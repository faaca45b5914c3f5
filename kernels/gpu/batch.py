"""A forward pass's tokens as a GPU's kernels see them: all that changes from pass to pass is in device memory.

So kernels that were recorded once (a CUDA graph) see new positions and pages when they are replayed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """One sequence's tokens: rows `first` to `first + tokens` of the pass, positions from `start`."""

    first: int
    tokens: int
    start: int


@dataclass(slots=True, eq=False, kw_only=True)
class DeviceBatch:
    """T tokens of S sequences, one sequence after the other. Tensors are int64 on the device unless said otherwise.

    Pages and states are addressed in bytes from the first of `base`, so that kernels know how they are aligned. They
    do not specialize it: Triton would take 32 bits for an address from it on AMD's GPUs, since the tensor itself is
    small. A row without a token has position -1, a sequence without one the count 0: a recorded pass may be larger
    than the one that is run.
    """

    base: torch.Tensor  # uint8, aligned as pages are
    sequences: torch.Tensor  # [T]: whose token a row is
    positions: torch.Tensor  # [T]
    firsts: torch.Tensor  # [S]: a sequence's first row
    counts: torch.Tensor  # [S]
    tables: list[torch.Tensor]  # for each group of layers [S, pages]: the addresses of a sequence's pages
    states: torch.Tensor  # [S, states]: the addresses of a sequence's states
    cos: torch.Tensor  # f32 [T, n], as sin
    sin: torch.Tensor
    # Of each sequence, where attention takes whole sequences; None: it takes one token at a time, whose position it
    # reads from the device.
    whole: list[Rows] | None

    @property
    def tokens(self) -> int:
        """Rows."""
        return len(self.positions)
