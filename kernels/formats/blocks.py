"""Formats whose numbers share scales, in the computing layout of kernels/cpu/blocks.h: 16 rows side by side.

The types are ggml's (ggml-quants.c, ggml-common.h); the bits of a file's blocks are kept, only their order changes.
The factors of a row's block and its numbers ("codes") are what all of them have in common:

    number = scale * (code - offset) + minimum, or scale * table[code]

with scale = d or d * sub-scale, minimum = m (legacy) or -d_min * sub-minimum (K-quants).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from ..geometry import BLOCKS, GROUP_ROWS, tensor_bytes
from ..quantizers.feedback import quantize
from .file_rows import pack_file_rows

UNIT: Final = 32  # columns
IQ4: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # what codes stand for
_LEGACY: Final = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


class Parts(NamedTuple):
    """A projection's numbers and factors: `codes` uint8 [rows, columns]; `d` and `m` f16 [rows, blocks] or None;
    `scales` and `minimums` [rows, sub-blocks], uint8 or int8, without d, or None."""

    codes: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    minimums: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One block format; `low` and `high` are the bits of a code, as blocks.h splits them."""

    name: str
    low: int
    high: int = 0
    offset: int = 0
    minimum: bool = False  # has m or d_min
    table: tuple[int, ...] | None = None

    @property
    def _columns(self) -> int:
        return BLOCKS[self.name][0]

    def encode(self, numbers: torch.Tensor, out: torch.Tensor) -> None:
        """Quantizes the legacy types as the gguf package does, the others as kernels/quantizers."""
        rows = _quantize(self.name, numbers) if self.name in _LEGACY else quantize(self.name, numbers)
        pack_file_rows(self.name, rows, numbers.shape[1], out)

    def view(self, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return raw

    def decode(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        columns = shape[1]
        codes, d, m, scales, minimums = self.parts(stored, shape)
        if self.table is not None:
            numbers = torch.tensor(self.table, dtype=torch.float32)[codes.long()]
        elif self.name == "q8_0":
            numbers = codes.view(torch.int8).float()
        else:
            numbers = codes.float() - self.offset
        scale = d.float()
        if scales is not None:
            scale = scale.repeat_interleave(scales.shape[1] // d.shape[1], 1) * scales.float()
        numbers = numbers * scale.repeat_interleave(numbers.shape[1] // scale.shape[1], 1)
        if m is not None:
            least = m.float()
            if minimums is not None:
                least = -(least.repeat_interleave(minimums.shape[1] // m.shape[1], 1) * minimums.float())
            numbers = numbers + least.repeat_interleave(numbers.shape[1] // least.shape[1], 1)
        return numbers[:, :columns].contiguous()

    def parts(self, stored: torch.Tensor, shape: tuple[int, ...]) -> Parts:
        """What `pack_file_rows` was given, in parts; columns up to whole blocks."""
        rows, columns = shape
        groups, blocks = -(-rows // GROUP_ROWS), -(-columns // self._columns)
        assert stored.numel() == tensor_bytes(self.name, rows, columns)
        parts = self._read(stored.view(groups, blocks, -1))
        cut = [None if part is None else part[:rows] for part in parts[1:]]
        return Parts(parts.codes[:rows], *cut)  # type: ignore[arg-type]

    def _read(self, stored: torch.Tensor) -> Parts:
        groups, blocks = stored.shape[:2]
        place = 0

        def take(nbytes: int) -> torch.Tensor:
            nonlocal place
            place += nbytes
            return stored[:, :, place - nbytes : place].contiguous()

        def by_row(plane: torch.Tensor) -> torch.Tensor:  # [groups, blocks, n, 16] → [rows, blocks * n]
            return plane.permute(0, 3, 1, 2).reshape(groups * GROUP_ROWS, -1)

        d = by_row(take(32).view(torch.float16).unsqueeze(2))
        m = by_row(take(32).view(torch.float16).unsqueeze(2)) if self.minimum else None
        scales, minimums = _unpack_scales(self.name, take)
        units = self._columns // UNIT
        planes = stored[:, :, place:].reshape(groups, blocks, units, self.low + self.high, GROUP_ROWS, 4)
        codes = unpack_bits(planes[:, :, :, : self.low], self.low)
        if self.high:
            codes = codes | unpack_bits(planes[:, :, :, self.low :], self.high) << self.low
        codes = codes.permute(0, 4, 1, 2, 3, 5).reshape(groups * GROUP_ROWS, -1)
        return Parts(
            codes, d, m, None if scales is None else by_row(scales), None if minimums is None else by_row(minimums)
        )


def unpack_bits(planes: torch.Tensor, bits: int) -> torch.Tensor:
    """[…, bits, 16, 4] bytes → […, 8, 16, 4] codes: neighbouring column groups share a byte."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1, 1)
    codes: torch.Tensor = planes.unsqueeze(4) >> shifts & ((1 << bits) - 1)
    return codes.flatten(3, 4)


# Sub-block scales: planes of [groups, blocks, n, 16 rows]; see `Scales` in blocks.h.
def _unpack_scales(name: str, take: Callable[[int], torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if name == "q6_k":
        return take(256).unflatten(2, (16, 16)).view(torch.int8), None
    if name == "q2_k":
        both = take(256).unflatten(2, (16, 16))
        return both & 15, both >> 4
    if name == "iq4_xs":
        low, high = take(64).unflatten(2, (4, 1, 16)), take(32).unflatten(2, (2, 1, 16))
        coded = torch.cat([low & 15, low >> 4], 3).flatten(2, 3)
        coded = coded | torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 3).flatten(2, 3) << 4
        return (coded - 32).view(torch.int8), None
    if name not in ("q3_k", "q4_k", "q5_k"):
        return None, None
    low, high = take(128).unflatten(2, (8, 16)), take(64).unflatten(2, (4, 1, 16))
    both = torch.cat([high & 15, high >> 4], 3).flatten(2, 3)
    first, second = low & 15 | (both & 3) << 4, low >> 4 | (both >> 2) << 4
    if name == "q3_k":
        return (torch.stack([first, second], 3).flatten(2, 3) - 32).view(torch.int8), None
    return first, second


def _quantize(name: str, numbers: torch.Tensor) -> torch.Tensor:
    """`numbers` [rows, columns] of any float type → uint8 [rows, bytes of a row], by the gguf package.

    Columns are padded to whole blocks with zeros.
    """
    import gguf

    columns = BLOCKS[name][0]
    padded = torch.nn.functional.pad(numbers.float(), (0, -numbers.shape[1] % columns))
    return torch.from_numpy(gguf.quantize(padded.numpy(), gguf.GGMLQuantizationType[name.upper()]))


BLOCK_FORMATS: Final = {
    block.name: block
    for block in (
        BlockFormat("q8_0", 8),
        BlockFormat("q4_0", 4, offset=8),
        BlockFormat("q4_1", 4, minimum=True),
        BlockFormat("q5_0", 4, 1, offset=16),
        BlockFormat("q5_1", 4, 1, minimum=True),
        BlockFormat("iq4_nl", 4, table=IQ4),
        BlockFormat("q2_k", 2, minimum=True),
        BlockFormat("q3_k", 2, 1, offset=4),
        BlockFormat("q4_k", 4, minimum=True),
        BlockFormat("q5_k", 4, 1, minimum=True),
        BlockFormat("q6_k", 4, 2, offset=32),
        BlockFormat("iq4_xs", 4, table=IQ4),
    )
}
