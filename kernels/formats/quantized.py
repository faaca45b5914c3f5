"""Quantized formats of safetensors checkpoints in the computing layout of kernels/cpu/blocks.h and fp8-inl.h.

    int4_g32, int4_g64, int4_g128   (code - zero) * scale, with both for each 32, 64, 128 columns of a row
    mxfp4                           E2M1 number * 2^(byte - 127), a byte for each 32 columns of a row (OCP MX)
    fp8_block                       E4M3 number * scale, one f32 for 128 rows x 128 columns

Sixteen rows lie side by side, rows are padded to 16 and columns to blocks with numbers that mean 0. Packing loses
nothing: what can't be stored exactly is refused. `encode`, for random weights and tests, takes the nearest code.
"""

from dataclasses import dataclass

import torch

from ..geometry import BLOCKS, GROUP_ROWS, GeometryError
from ..native import pack_fp8, pack_words
from .base import WeightFormat
from .int4_sources import Int4Weights
from .nibbles import pack_nibbles, unpack_nibbles

FP8_ROWS = 128  # that share a scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def int4_factors(scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`scales` f32 and `zeros` uint8 as they are stored: f16, and uint8 of zero | n << 4, see Int4Format.

    Raises GeometryError for scales that are no 16-bit floats.
    """
    # Exponents of 8 bits each step: the largest n that keeps the f16 below its largest number.
    _, exponent = torch.frexp(scales)
    steps = torch.div(15 - exponent, 8, rounding_mode="floor").clamp(0, 15)
    halves = torch.ldexp(scales, 8 * steps)
    if not torch.equal(halves.half().float(), halves):
        raise GeometryError("The scales of int4 weights are no 16-bit floats up to 65504, which is what is stored.")
    return halves.half(), zeros | steps.to(torch.uint8) << 4


@dataclass(frozen=True, slots=True)
class Int4Format:
    """Per block and 16 rows: f16 scales, a byte a row (zero | n << 4), codes of 4 bits.

    A scale is meant times 2^-8n; n makes each bf16 scale up to 65504 exact, however small.
    """

    name: str

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return BLOCKS[self.name][0]

    def encode(self, numbers: torch.Tensor, out: torch.Tensor) -> None:
        rows, columns = numbers.shape
        blocks = -(-columns // self.group)
        padded = _padded(numbers.float(), rows, blocks * self.group).view(rows, blocks, self.group)
        scales = (padded.abs().amax(2) / 7).half().float()
        codes = (padded / scales.clamp_min(1e-7).unsqueeze(2)).round().clamp(-8, 7) + 8
        zeros = torch.full((rows, blocks), 8, dtype=torch.uint8)
        self.pack(Int4Weights.of_codes(codes.to(torch.uint8).flatten(1)[:, :columns], scales, zeros, self.group), out)

    def pack(self, source: Int4Weights, out: torch.Tensor) -> None:
        """Lays `source` out in `out` (uint8 [tensor_bytes]). A larger group's scales are repeated.

        Raises GeometryError for groups that are no multiple of this format's, and scales that are no 16-bit floats;
        NativeLibraryError.
        """
        rows, columns = len(source.words), source.columns
        blocks = -(-columns // self.group)
        if source.group % self.group and source.group < columns:
            raise GeometryError(f"Groups of {source.group} columns can't be stored as {self.name}.")
        repeats = max(1, source.group // self.group) if source.group < columns else blocks
        scales = source.scales.repeat_interleave(repeats, 1)[:, :blocks]
        zeros = source.zeros.repeat_interleave(repeats, 1)[:, :blocks]
        halves, coded = int4_factors(scales, zeros)
        groups = -(-rows // GROUP_ROWS)
        coded = _padded(coded, groups * GROUP_ROWS, blocks)
        stored = out.view(groups, blocks, -1)
        stored[:, :, :32] = _beside(_padded(halves, groups * GROUP_ROWS, blocks)).view(torch.uint8)
        stored[:, :, 32:48] = _beside(coded)
        pack_words(self.name, source.words, columns, out)

    def view(self, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return raw

    def decode(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return self.unpack(stored, shape).decode()

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> Int4Weights:
        """What `pack` was given, with a scale for each of this format's groups."""
        rows, columns = shape
        groups, blocks = -(-rows // GROUP_ROWS), -(-columns // self.group)
        parts = stored.view(groups, blocks, -1)
        halves = _apart(parts[:, :, :32].contiguous().view(torch.float16)).float()
        coded = _apart(parts[:, :, 32:48])
        scales = torch.ldexp(halves, -8 * (coded >> 4).int())
        codes = _codes(parts[:, :, 48:], groups, blocks)
        return Int4Weights.of_codes(codes[:rows, :columns], scales[:rows], (coded & 15)[:rows], self.group)


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Weights:
    """`words` int32 [rows, columns / 8] of E2M1 codes (nibbles.py); `scales` uint8 [rows, columns / 32].

    A scale is a power of two plus 127.
    """

    words: torch.Tensor
    columns: int
    scales: torch.Tensor

    @classmethod
    def of_codes(cls, codes: torch.Tensor, scales: torch.Tensor) -> "Mxfp4Weights":
        """From `codes` uint8 [rows, columns]."""
        return cls(pack_nibbles(codes), codes.shape[1], scales)

    @classmethod
    def of_blocks(cls, blocks: torch.Tensor, scales: torch.Tensor) -> "Mxfp4Weights":
        """From `blocks` uint8 [rows, blocks, 16] or the same flat, the lower 4 bits first, as in gpt-oss."""
        octets = blocks.flatten(1)
        return cls(octets.contiguous().view(torch.int32), 2 * octets.shape[1], scales)

    @property
    def codes(self) -> torch.Tensor:
        """uint8 [rows, columns], 0 to 15."""
        return unpack_nibbles(self.words, self.columns)


class Mxfp4Format:
    """Per block and 16 rows: a byte a row, codes of 4 bits. A scale of 2^-127 (byte 0) counts as 0."""

    name = "mxfp4"

    def encode(self, numbers: torch.Tensor, out: torch.Tensor) -> None:
        rows, columns = numbers.shape
        blocks = -(-columns // 32)
        padded = _padded(numbers.float(), rows, blocks * 32).view(rows, blocks, 32)
        _, exponent = torch.frexp(padded.abs().amax(2))
        scales = (exponent + 127 - 3).clamp(1, 254)  # so that the largest lies in 4 to 8
        scaled = torch.ldexp(padded, 127 - scales.unsqueeze(2))
        borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        codes = torch.bucketize(scaled.abs(), borders) | (scaled < 0) << 3
        self.pack(Mxfp4Weights.of_codes(codes.to(torch.uint8).flatten(1)[:, :columns], scales.to(torch.uint8)), out)

    def pack(self, source: Mxfp4Weights, out: torch.Tensor) -> None:
        """Lays `source` out in `out` (uint8 [tensor_bytes]).

        Raises GeometryError for wrong shapes and for NaNs, NativeLibraryError.
        """
        rows, columns = len(source.words), source.columns
        groups, blocks = -(-rows // GROUP_ROWS), -(-columns // 32)
        if tuple(source.scales.shape) != (rows, blocks):
            raise GeometryError(f"MXFP4 needs scales of shape {[rows, blocks]}, not {list(source.scales.shape)}.")
        if (source.scales == 255).any():
            raise GeometryError("The MXFP4 weights have a scale that is not a number.")
        stored = out.view(groups, blocks, -1)
        stored[:, :, :16] = _beside(_padded(source.scales, groups * GROUP_ROWS, blocks))
        pack_words("mxfp4", source.words, columns, out)

    def view(self, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return raw

    def decode(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        rows, columns = shape
        blocks = -(-columns // 32)
        source = self.unpack(stored, (rows, blocks * 32))
        exponents = source.scales.int()
        numbers = torch.tensor(E2M1)[source.codes.long()].view(rows, blocks, 32)
        numbers = torch.ldexp(numbers, (exponents - 127).unsqueeze(2))
        numbers[exponents == 0] = 0.0
        return numbers.flatten(1)[:, :columns].contiguous()

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> Mxfp4Weights:
        """What `pack` was given."""
        rows, columns = shape
        groups, blocks = -(-rows // GROUP_ROWS), -(-columns // 32)
        parts = stored.view(groups, blocks, -1)
        codes = _codes(parts[:, :, 16:], groups, blocks)
        return Mxfp4Weights.of_codes(codes[:rows, :columns], _apart(parts[:, :, :16])[:rows])


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weights:
    """`codes` float8_e4m3fn [rows, columns]; `scales` f32 [ceil(rows / 128), ceil(columns / 128)], factors."""

    codes: torch.Tensor
    scales: torch.Tensor


class Fp8Format:
    """Per 128 columns and 16 rows: the scale (f32), 12 bytes of zeros, then column after column 16 codes."""

    name = "fp8_block"

    def encode(self, numbers: torch.Tensor, out: torch.Tensor) -> None:
        rows, columns = numbers.shape
        high, wide = -(-rows // FP8_ROWS), -(-columns // 128)
        blocks = _padded(numbers.float(), high * FP8_ROWS, wide * 128).view(high, FP8_ROWS, wide, 128)
        scales = blocks.abs().amax((1, 3)).clamp_min(1e-30) / 448
        codes = (blocks / scales.view(high, 1, wide, 1)).view(high * FP8_ROWS, -1)[:rows, :columns]
        self.pack(Fp8Weights(codes.to(torch.float8_e4m3fn), scales), out)

    def pack(self, source: Fp8Weights, out: torch.Tensor) -> None:
        """Lays `source` out in `out` (uint8 [tensor_bytes]).

        Raises GeometryError for wrong shapes and for NaNs, NativeLibraryError.
        """
        rows, columns = source.codes.shape
        groups, blocks = -(-rows // GROUP_ROWS), -(-columns // 128)
        wanted = (-(-rows // FP8_ROWS), blocks)
        if tuple(source.scales.shape) != wanted:
            raise GeometryError(f"FP8 weights of {rows} rows need scales of shape {list(wanted)}, not others.")
        stored = out.view(groups, blocks, -1)
        scales = source.scales.float().repeat_interleave(FP8_ROWS // GROUP_ROWS, 0)[:groups]
        stored[:, :, :4] = scales.contiguous().view(torch.uint8).view(groups, blocks, 4)
        stored[:, :, 4:16] = 0
        if not pack_fp8(source.codes.view(torch.uint8), out):
            raise GeometryError("The FP8 weights have a number that is not one (NaN).")

    def view(self, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return raw

    def decode(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        rows, columns = shape
        source = self.unpack(stored, shape)
        scales = source.scales.repeat_interleave(FP8_ROWS, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        return source.codes.float() * scales

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> Fp8Weights:
        """What `pack` was given."""
        rows, columns = shape
        groups, blocks = -(-rows // GROUP_ROWS), -(-columns // 128)
        parts = stored.view(groups, blocks, -1)
        scales = parts[:: FP8_ROWS // GROUP_ROWS, :, :4].contiguous().view(torch.float32).squeeze(2)
        codes = parts[:, :, 16:].reshape(groups, blocks, 128, GROUP_ROWS).permute(0, 3, 1, 2)
        codes = codes.reshape(groups * GROUP_ROWS, -1)[:rows, :columns].contiguous()
        return Fp8Weights(codes.view(torch.float8_e4m3fn), scales)


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    if tuple(matrix.shape) == (rows, columns):
        return matrix
    padded = torch.zeros(rows, columns, dtype=matrix.dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _beside(factors: torch.Tensor) -> torch.Tensor:
    """[16 * groups, blocks] → [groups, blocks, 16]."""
    return factors.view(-1, GROUP_ROWS, factors.shape[1]).permute(0, 2, 1).contiguous()


def _apart(factors: torch.Tensor) -> torch.Tensor:
    """[groups, blocks, 16] → [16 * groups, blocks]."""
    return factors.permute(0, 2, 1).reshape(-1, factors.shape[1])


def _codes(planes: torch.Tensor, groups: int, blocks: int) -> torch.Tensor:
    """Units of 32 columns, uint8 [groups, blocks, bytes], see blocks.h → codes uint8 [16 * groups, columns]."""
    shared = planes.reshape(groups, blocks, -1, 4, GROUP_ROWS, 4)
    units = torch.stack((shared & 15, shared >> 4), 4).flatten(3, 4)
    return units.permute(0, 4, 1, 2, 3, 5).reshape(groups * GROUP_ROWS, -1)


QUANTIZED_FORMATS: dict[str, WeightFormat] = {
    "int4_g32": Int4Format("int4_g32"),
    "int4_g64": Int4Format("int4_g64"),
    "int4_g128": Int4Format("int4_g128"),
    "mxfp4": Mxfp4Format(),
    "fp8_block": Fp8Format(),
}
