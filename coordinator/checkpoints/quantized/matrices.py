"""Matrices of quantized checkpoints in memory, each in its own bits: what they mean, some of their rows, their blob.

A matrix is [rows, columns] = [out, in]. `pack` writes it as kernels compute it, which rounds nothing but what is said
at the class.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from moehive.kernels.formats.file_rows import pack_file_rows
from moehive.kernels.formats.int4_sources import Int4Weights
from moehive.kernels.formats.quantized import (
    E2M1,
    FP8_ROWS,
    Fp8Format,
    Fp8Weights,
    Int4Format,
    Mxfp4Format,
    Mxfp4Weights,
)
from moehive.kernels.geometry import Format, GeometryError

Q8_COLUMNS = 32  # of a block in q8_0


class Matrix(Protocol):
    """One matrix that was read."""

    def numbers(self) -> torch.Tensor:
        """What the stored bits mean, f32 [rows, columns]."""
        ...

    def take(self, rows: torch.Tensor) -> "Matrix":
        """The rows with these numbers (int64), in this order. Raises GeometryError where rows share scales."""
        ...

    def pack(self, format: Format, out: torch.Tensor) -> None:
        """Lays the matrix out in `format` (one that suits its kind) in `out`, uint8 [tensor_bytes], aligned to 64.

        Raises GeometryError for numbers that `format` can't hold.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Matrix:
    """`codes` float8_e4m3fn [rows, columns]; `scales` f32, one for each block of `block` = (rows, columns)."""

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    def numbers(self) -> torch.Tensor:
        """See Matrix."""
        rows, columns = self.codes.shape
        scales = self.scales.repeat_interleave(self.block[0], 0)[:rows]
        return self.codes.float() * scales.repeat_interleave(self.block[1], 1)[:, :columns]

    def take(self, rows: torch.Tensor) -> "Fp8Matrix":
        """See Matrix; `rows` must be whole blocks, as `whole_blocks` says, if there is more than one scale."""
        if self.scales.numel() == 1:
            return replace(self, codes=self.codes.view(torch.uint8)[rows].view(self.codes.dtype))
        first, last = int(rows[0]), int(rows[-1]) + 1
        if not whole_blocks(rows, self.block[0]):
            raise GeometryError("Rows of FP8 weights that share a scale can't be taken apart.")
        scales = self.scales[first // self.block[0] : -(-last // self.block[0])]
        return replace(self, codes=self.codes[first:last], scales=scales)

    def pack(self, format: Format, out: torch.Tensor) -> None:
        """See Matrix; `format` is fp8_block."""
        rows, columns = self.codes.shape
        high, wide = -(-rows // FP8_ROWS), -(-columns // FP8_ROWS)
        scales = self.scales.expand(high, wide) if self.scales.numel() == 1 else self.scales
        Fp8Format().pack(Fp8Weights(self.codes, scales), out)


def whole_blocks(rows: torch.Tensor, block: int) -> bool:
    """Whether row numbers are one stretch, upwards, that begins where a block does."""
    first = int(rows[0])
    return first % block == 0 and torch.equal(rows, torch.arange(first, first + len(rows)))


@dataclass(frozen=True, slots=True, eq=False)
class Int4Matrix:
    """Codes of 4 bits with a scale and a zero point for each group of columns.

    Scales of 16 bits are kept. Scales in f32 are rounded to 11 bits when they are packed, an error of at most 2^-11
    (f16's), which is a quarter of what bf16 weights are rounded by.
    """

    weights: Int4Weights

    def numbers(self) -> torch.Tensor:
        """See Matrix."""
        return self.weights.decode()

    def take(self, rows: torch.Tensor) -> "Int4Matrix":
        """See Matrix."""
        w = self.weights
        return Int4Matrix(replace(w, words=w.words[rows], scales=w.scales[rows], zeros=w.zeros[rows]))

    def pack(self, format: Format, out: torch.Tensor) -> None:
        """See Matrix; `format` is one of int4_g32, int4_g64, int4_g128."""
        scales = self.weights.scales
        if (scales.view(torch.int32) & 0x1FFF).any():  # more than the 11 bits that 16-bit sources have at most
            fraction, exponent = torch.frexp(scales)
            scales = torch.ldexp(torch.ldexp(fraction, torch.tensor(11)).round(), exponent - 11)
        Int4Format(format).pack(replace(self.weights, scales=scales), out)


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Matrix:
    """Codes of 4 bits (E2M1) with a power of two for each 32 columns."""

    weights: Mxfp4Weights

    def numbers(self) -> torch.Tensor:
        """See Matrix."""
        codes = self.weights.codes
        values = torch.tensor(E2M1)[codes.long()].view(len(codes), -1, 32)
        return torch.ldexp(values, self.weights.scales.int().unsqueeze(2) - 127).view(codes.shape)

    def take(self, rows: torch.Tensor) -> "Mxfp4Matrix":
        """See Matrix."""
        return Mxfp4Matrix(replace(self.weights, words=self.weights.words[rows], scales=self.weights.scales[rows]))

    def pack(self, format: Format, out: torch.Tensor) -> None:
        """See Matrix; `format` is mxfp4."""
        Mxfp4Format().pack(self.weights, out)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Matrix:
    """`codes` int8 [rows, columns]; `scales` f32 [rows, groups]; `zeros` int8 [rows, groups] or None: all 0.

    Packed as q8_0, whose blocks of 32 columns repeat the group's scale in f16: bf16's are exact from 2^-17 on, others
    are rounded by at most 2^-11; smaller scales are refused, not rounded to nothing.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def numbers(self) -> torch.Tensor:
        """See Matrix."""
        codes, scales = self.codes.float(), self._by_column(self.scales)
        return codes * scales if self.zeros is None else (codes - self._by_column(self.zeros).float()) * scales

    def take(self, rows: torch.Tensor) -> "Int8Matrix":
        """See Matrix."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Int8Matrix(self.codes[rows], self.scales[rows], zeros)

    def pack(self, format: Format, out: torch.Tensor) -> None:
        """See Matrix; `format` is q8_0, for weights without zero points in groups of whole blocks."""
        rows, columns = self.codes.shape
        blocks = -(-columns // Q8_COLUMNS)
        halves = self.scales.half()
        if ((halves.float() - self.scales).abs() > self.scales.abs() * 2.0**-11).any() or self.zeros is not None:
            raise GeometryError("The int8 weights have scales that f16, which q8_0 stores, can't hold.")
        padded = torch.zeros(rows, blocks * Q8_COLUMNS, dtype=torch.int8)
        padded[:, :columns] = self.codes
        stored = torch.empty(rows, blocks, 34, dtype=torch.uint8)
        by_block = halves.repeat_interleave(-(-blocks // halves.shape[1]), 1)[:, :blocks]
        stored[:, :, :2] = by_block.contiguous().view(torch.uint8).view(rows, blocks, 2)
        stored[:, :, 2:] = padded.view(torch.uint8).view(rows, blocks, Q8_COLUMNS)
        pack_file_rows("q8_0", stored.view(rows, -1), columns, out)

    def _by_column(self, factors: torch.Tensor) -> torch.Tensor:
        columns = self.codes.shape[1]
        return factors.repeat_interleave(-(-columns // factors.shape[1]), 1)[:, :columns]
