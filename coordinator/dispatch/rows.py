"""What nodes computed of a layer, added up in a fixed order."""

from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels.ops import Reduction

from ..types import NodeName
from .routing import Share


class Rows(NamedTuple):
    """What was computed of a share: [rows, hidden]."""

    share: Share
    values: torch.Tensor
    node: NodeName | None  # None: this process


def add_up(parts: Sequence[Rows], tokens: int, k: int, size: int, reduction: Reduction) -> torch.Tensor:
    """f32 [tokens, size]; with PER_EXPERT in the router's order, else in that of `parts`."""
    if reduction is Reduction.PER_EXPERT:
        pairs = torch.zeros((tokens * k, size), dtype=torch.float32)
        for share, values, _ in parts:
            pairs[torch.from_numpy(share.pairs)] = values.float()
        return pairs.view(tokens, k, size).sum(dim=1)
    rest = iter(parts)
    if parts and len(parts[0].share.tokens) == tokens:
        total = next(rest).values.to(torch.float32, copy=True)  # a reply's own rows are not to be written to
    else:
        total = torch.zeros((tokens, size), dtype=torch.float32)
    for share, values, _ in rest:
        start, end = int(share.tokens[0]), int(share.tokens[-1]) + 1
        if len(share.tokens) == end - start:  # all tokens, or all of a piece
            total[start:end] += values
        else:
            total.index_add_(0, torch.from_numpy(share.tokens), values.float())
    return total


def rows_of(hidden: torch.Tensor, share: Share) -> torch.Tensor:
    """The hidden states [rows, hidden] of a share's tokens."""
    if len(share.tokens) == hidden.shape[0]:
        return hidden
    return hidden[torch.from_numpy(share.tokens)]


def is_finite(rows: torch.Tensor) -> bool:
    """Whether every number of f32 [rows, hidden] is one; numbers whose squares are too large count as none."""
    flat = rows.numpy().reshape(-1)
    return isfinite(float(np.dot(flat, flat)))


def array(tensor: torch.Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    """A tensor's numbers as `dtype`; on the CPU and of that type already, the usual case, they are not copied."""
    if tensor.dtype is not dtype or tensor.device.type != "cpu":
        tensor = tensor.to("cpu", dtype)
    return tensor.numpy()
