"""What nodes computed of a layer, added up in a fixed order."""

from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels import native
from moehive.kernels.ops import Reduction
from moehive.proto.rounding import SCALE_COLUMNS, Rounded, add_rounded, unround_rows
from moehive.proto.tensors import rows_tensor, tensor_buffer
from moehive.proto.wire.messages import Buffer

from ..types import NodeName
from .routing import Share

_MOST_STEPS, _LARGEST = 128, float(np.finfo(np.float32).max)  # of a number in 8 bits; that f32 has


class Rows:
    """What was computed of a share, by `node` (None: by this process): [rows, hidden]."""

    __slots__ = ("_values", "node", "raw", "rounded", "shape", "share")

    def __init__(self, share: Share, node: NodeName | None, values: torch.Tensor) -> None:
        self.share = share
        self.node = node
        self._values: torch.Tensor | None = values
        self.raw: Buffer | None = None  # as a reply brought them
        self.rounded: Rounded | None = None  # the same, in 8 bits
        self.shape: tuple[int, int, torch.dtype]

    @classmethod
    def of_bytes(
        cls, share: Share, node: NodeName, raw: Buffer, rows: int, hidden: int, dtype: torch.dtype
    ) -> "Rows":
        """Of f32 or bf16 numbers that nobody has looked at: when they are only added, no tensor is made of them."""
        made = cls.__new__(cls)
        made.share, made.node, made.raw, made.rounded, made._values = share, node, raw, None, None
        made.shape = rows, hidden, dtype
        return made

    @classmethod
    def of_rounded(cls, share: Share, node: NodeName, rounded: Rounded, rows: int, hidden: int) -> "Rows":
        """Of numbers in 8 bits, of which no tensor is made either when they are only added."""
        made = cls.__new__(cls)
        made.share, made.node, made.raw, made.rounded, made._values = share, node, None, rounded, None
        made.shape = rows, hidden, torch.float32
        return made

    @property
    def values(self) -> torch.Tensor:
        """The numbers, only to be read."""
        if self._values is None:
            rows, hidden, dtype = self.shape
            if self.rounded is not None:
                self._values = unround_rows(self.rounded, rows, hidden)
            else:
                assert self.raw is not None
                self._values = rows_tensor(self.raw, dtype, rows, hidden)
        return self._values

    @property
    def finite(self) -> bool:
        """See `is_finite`."""
        if self.rounded is not None:
            scales = np.frombuffer(self.rounded.scales, np.float32)
            # What so many steps could make of the scales, which is nearly always enough to know.
            if float(np.dot(scales, scales)) * SCALE_COLUMNS * _MOST_STEPS**2 < _LARGEST:
                return True
        return is_finite(self.values.float())


class Sum(NamedTuple):
    """Added up, and whether every number of it is one; numbers whose squares are too large count as none."""

    total: torch.Tensor  # [tokens, hidden]
    finite: bool


def add_up(parts: Sequence[Rows], shape: tuple[int, ...], hidden: torch.Tensor, reduction: Reduction) -> Sum:
    """As `hidden` [tokens, hidden], added in f32: with PER_EXPERT in the router's order, else in that of `parts`.

    `shape` of the router's top-k: tokens, k.
    """
    (tokens, k), size, dtype = shape, hidden.shape[1], hidden.dtype
    if reduction is Reduction.PARTIAL_SUM and parts and all(len(rows.share.tokens) == tokens for rows in parts):
        # Each node has some expert of each token: the case of decoding, and of most chunks of a prompt.
        raw = [rows.raw for rows in parts if rows.raw is not None]
        if len(raw) == len(parts):
            return Sum(*native.add_rows(raw, tokens, size, dtype))
        rounded = [rows.rounded for rows in parts if rows.rounded is not None]
        if len(rounded) == len(parts):
            return Sum(*add_rounded(rounded, tokens, size, dtype))
        values = [rows.values for rows in parts]
        if all(value.dtype is torch.float32 for value in values):  # some came in 8 bits
            raw = [tensor_buffer(value) for value in values]
            total, finite = native.add_rows(raw, tokens, size, torch.float32)
            return Sum(total.to(dtype), finite)
    total = _add_tensors(parts, tokens, k, size, reduction)
    return Sum(total if dtype is torch.float32 else total.to(dtype), is_finite(total))


def _add_tensors(parts: Sequence[Rows], tokens: int, k: int, size: int, reduction: Reduction) -> torch.Tensor:
    if reduction is Reduction.PER_EXPERT:
        pairs = torch.zeros((tokens * k, size), dtype=torch.float32)
        for rows in parts:
            pairs[torch.from_numpy(rows.share.pairs)] = rows.values.float()
        total = torch.zeros((tokens, size), dtype=torch.float32)
        for place in range(k):  # one by one, as flights add them
            total += pairs[place::k]
        return total
    rest = iter(parts)
    if parts and len(parts[0].share.tokens) == tokens:
        total = next(rest).values.to(torch.float32, copy=True)  # a reply's own rows are not to be written to
    else:
        total = torch.zeros((tokens, size), dtype=torch.float32)
    for rows in rest:
        start, end = int(rows.share.tokens[0]), int(rows.share.tokens[-1]) + 1
        if len(rows.share.tokens) == end - start:  # all tokens, or all of a piece
            total[start:end] += rows.values
        else:
            total.index_add_(0, torch.from_numpy(rows.share.tokens), rows.values.float())
    return total


def rows_of(hidden: torch.Tensor, share: Share) -> torch.Tensor:
    """The hidden states [rows, hidden] of a share's tokens; of tokens in a row, `hidden`'s own."""
    if len(share.tokens) == hidden.shape[0]:
        return hidden
    start, end = int(share.tokens[0]), int(share.tokens[-1]) + 1
    if len(share.tokens) == end - start:
        return hidden[start:end]
    return hidden[torch.from_numpy(share.tokens)]


def is_finite(rows: torch.Tensor) -> bool:
    """Whether every number of f32 [rows, hidden] is one; numbers whose squares are too large count as none."""
    flat = rows.numpy().reshape(-1)
    return isfinite(float(np.dot(flat, flat)))


def array(tensor: torch.Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    """A tensor's numbers as `dtype`; on the CPU and of that type already, the usual case, they are not copied."""
    if tensor.dtype is not dtype or not tensor.is_cpu:
        tensor = tensor.to("cpu", dtype)
    return tensor.numpy()
