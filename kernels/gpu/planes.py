"""How a projection [rows, columns] lies in a GPU's memory: a few planes, each row after row.

A GPU reads best what many threads can load side by side, so the parts of a format's blocks are separated into planes:
the values, their scales, their minimums. The values keep their bits; six-bit scales of K-quants take a byte. Columns
are padded to whole blocks with zeros.

    f32, bf16, f16   values
    fp8_block        values e4m3 [rows, columns]; scales f32 [rows/128, columns/128]
    int4_g*          nibbles; scales f16 [rows, columns/group], times 2^-8n; as many uint8, zero | n << 4
    mxfp4            nibbles (e2m1); scales uint8, powers of two [rows, columns/32]
    q8_0             values int8; scales f16 [rows, columns/32]
    q4_0             nibbles; scales f16 [rows, columns/32]
    q4_k             nibbles; scales and minimums uint8 [rows, columns/32]; their two factors f16 [rows, columns/256]
    q6_k             nibbles; upper two bits; scales int8 [rows, columns/16]; their factor f16 [rows, columns/256]

Nibbles: byte j of each 16 holds column j of 32 in its lower half and column j + 16 in its upper half. Upper bits of
q6_k: byte j of each 16 holds columns j, j + 16, j + 32, j + 48 of 64, two bits each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from ..formats.plain import PLAIN_TYPES
from ..formats.quantized import int4_factors
from ..geometry import BLOCKS, GPU_BLOCKS

ALIGNMENT: Final = 128  # bytes; what one warp loads at once

_GROUP = {"int4_g32": 32, "int4_g64": 64, "int4_g128": 128}
# Columns of one block: a row is padded to whole blocks, and a kernel's step is a multiple of the smaller ones.
BLOCK_COLUMNS: Final = {
    **dict.fromkeys(PLAIN_TYPES, 1),
    **{fmt: BLOCKS[fmt][0] for fmt in GPU_BLOCKS},
}


class PlanesError(ValueError):
    """Weights that can't be laid out for a GPU; the text is one sentence."""


@dataclass(frozen=True, slots=True)
class Planes:
    """Where the planes of a projection lie, from its first byte; `columns` is padded, `offsets` are in bytes."""

    format: str
    rows: int
    columns: int
    offsets: tuple[int, int, int, int]  # values, scales, second (minimums, zeros, upper bits), factors; 0 if absent
    nbytes: int


def planes(fmt: str, rows: int, columns: int) -> Planes:
    """The layout of a projection [rows, columns]. Raises PlanesError for a format without a GPU kernel."""
    if fmt not in BLOCK_COLUMNS:
        known = ", ".join(BLOCK_COLUMNS)
        raise PlanesError(f"There is no GPU kernel for weights in {fmt}; a GPU computes {known}.")
    block = BLOCK_COLUMNS[fmt]
    padded = -(-columns // block) * block
    offsets = [0, 0, 0, 0]
    end = 0
    for place, nbytes in enumerate(_plane_bytes(fmt, rows, padded)):
        if nbytes:
            offsets[place] = end
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return Planes(fmt, rows, padded, (offsets[0], offsets[1], offsets[2], offsets[3]), end)


def _plane_bytes(fmt: str, rows: int, columns: int) -> tuple[int, int, int, int]:
    numbers = rows * columns
    if fmt in PLAIN_TYPES:
        return numbers * PLAIN_TYPES[fmt].itemsize, 0, 0, 0
    if fmt in _GROUP:
        groups = numbers // _GROUP[fmt]
        return numbers // 2, 2 * groups, groups, 0
    match fmt:
        case "fp8_block":
            return numbers, 4 * -(-rows // 128) * (columns // 128), 0, 0
        case "mxfp4":
            return numbers // 2, numbers // 32, 0, 0
        case "q8_0":
            return numbers, numbers // 16, 0, 0
        case "q4_0":
            return numbers // 2, numbers // 16, 0, 0
        case "q4_k":
            return numbers // 2, numbers // 32, numbers // 32, numbers // 64
        case _:
            return numbers // 2, numbers // 16, numbers // 4, numbers // 128


def lay_out(fmt: str, source: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
    """Writes a projection into `out` (uint8 [planes.nbytes], any device), from the form in which it comes.

    `source` holds `values`, one number's code each, [rows, columns], and by format:

        f32, bf16, f16   `values` alone
        fp8_block        `values` float8_e4m3fn; `scales` f32 [rows/128, columns/128], rounded up
        int4_g*          `values` uint8 of 0..15; `scales` f32 that are 16-bit floats, `zeros` uint8, [rows, groups]
        mxfp4            `values` uint8 of 0..15; `scales` uint8 [rows, columns/32]
        q8_0, q4_0       `values` uint8; `scales` f16 [rows, columns/32]
        q4_k             `values` uint8; `scales`, `minimums` uint8 [rows, columns/32]; `factors` f16, d and d_min in
                         turn [rows, columns/128]
        q6_k             `values` uint8 of 0..63; `scales` int8 [rows, columns/16]; `factors` f16 [rows, columns/256]

    GGUF types also come as `rows`, uint8 [rows, bytes of a row], as they lie in a file. Raises PlanesError for
    another size.
    """
    if "rows" in source:
        source = _FILE_TYPES[fmt](_blocks(fmt, source["rows"]))
    rows, columns = source["values"].shape
    place = planes(fmt, rows, columns)
    if out.numel() != place.nbytes or out.dtype != torch.uint8:
        raise PlanesError(
            f"A projection in {fmt} of {[rows, columns]} takes {place.nbytes} bytes, not {out.numel()}."
        )
    out.zero_()
    for offset, plane in zip(place.offsets, _split(fmt, source, place.columns), strict=True):
        if plane is not None:
            raw = plane.contiguous().view(torch.uint8).reshape(-1)
            out[offset : offset + raw.numel()].copy_(raw)


_Four = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _split(fmt: str, source: Mapping[str, torch.Tensor], columns: int) -> _Four:
    values = source["values"]
    if fmt in PLAIN_TYPES:
        return values.to(PLAIN_TYPES[fmt]), None, None, None
    if fmt in _GROUP:
        return _pack_nibbles(_pad(values, columns)), *int4_factors(source["scales"], source["zeros"]), None
    match fmt:
        case "fp8_block":
            return _pad(values.view(torch.uint8), columns), source["scales"].float(), None, None
        case "q8_0":
            return values, source["scales"], None, None
        case "q4_0" | "mxfp4":
            return _pack_nibbles(_pad(values, columns)), source["scales"], None, None
        case "q4_k":
            return _pack_nibbles(values), source["scales"], source["minimums"], source["factors"]
        case _:
            upper = (values >> 4).reshape(values.shape[0], -1, 4, 16)
            bits = upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6
            return _pack_nibbles(values & 15), source["scales"], bits, source["factors"]


def _pad(values: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, columns - values.shape[1]))


def _pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns] of 0..15 → [rows, columns / 2]."""
    halves = values.reshape(values.shape[0], -1, 2, 16)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(values.shape[0], -1)


# Bytes of a block in a file (ggml-common.h).
_FILE_BLOCKS = {"q8_0": 34, "q4_0": 18, "q4_k": 144, "q6_k": 210}
_Source = dict[str, torch.Tensor]


def _blocks(fmt: str, rows: torch.Tensor) -> torch.Tensor:
    block = _FILE_BLOCKS[fmt]
    if rows.shape[1] % block:
        raise PlanesError(f"A row in {fmt} has a multiple of {block} bytes, not {rows.shape[1]}.")
    return rows.reshape(rows.shape[0], -1, block)


def _halves(blocks: torch.Tensor) -> torch.Tensor:
    """Bytes [rows, blocks, 2 n] → f16 [rows, blocks * n]."""
    return blocks.contiguous().view(torch.float16).flatten(1)


def _q8_0(blocks: torch.Tensor) -> _Source:
    return {"values": blocks[:, :, 2:].flatten(1), "scales": _halves(blocks[:, :, :2])}


def _q4_0(blocks: torch.Tensor) -> _Source:
    values = torch.cat([blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4], 2)
    return {"values": values.flatten(1), "scales": _halves(blocks[:, :, :2])}


def _q4_k(blocks: torch.Tensor) -> _Source:
    packed = blocks[:, :, 4:16]
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    pairs = blocks[:, :, 16:].reshape(len(blocks), -1, 4, 1, 32)  # of 64 columns: lower halves first, then upper ones
    return {
        "values": torch.cat([pairs & 15, pairs >> 4], 3).reshape(len(blocks), -1),
        "scales": torch.cat([low & 63, (high & 15) | (low >> 6) << 4], -1).flatten(1),
        "minimums": torch.cat([middle & 63, high >> 4 | (middle >> 6) << 4], -1).flatten(1),
        "factors": _halves(blocks[:, :, :4]),
    }


def _q6_k(blocks: torch.Tensor) -> _Source:
    count = len(blocks)
    low = blocks[:, :, :128].reshape(count, -1, 2, 1, 64)  # of 128 columns: 64 in lower halves, then 64 in upper ones
    high = blocks[:, :, 128:192].reshape(count, -1, 2, 1, 32)  # of 128 columns: two bits for each 32
    lower = torch.cat([low & 15, low >> 4], 3).reshape(count, -1)
    upper = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 3).reshape(count, -1)
    return {
        "values": lower | upper << 4,
        "scales": blocks[:, :, 192:208].contiguous().view(torch.int8).flatten(1),
        "factors": _halves(blocks[:, :, 208:]),
    }


_FILE_TYPES = {"q8_0": _q8_0, "q4_0": _q4_0, "q4_k": _q4_k, "q6_k": _q6_k}
