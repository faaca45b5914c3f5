"""ggml's block types as they lie in a GGUF file, split into codes and factors (ggml-common.h, ggml-quants.c)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

from ..geometry import BLOCKS, GeometryError

if TYPE_CHECKING:
    from .blocks import Parts

Take: TypeAlias = Callable[[int], torch.Tensor]


def quantize(name: str, numbers: torch.Tensor) -> torch.Tensor:
    """`numbers` [rows, columns] of any float type → uint8 [rows, bytes of a row], by the gguf package.

    Columns are padded to whole blocks with zeros. Raises GeometryError for a type that the package only reads.
    """
    import gguf

    columns = BLOCKS[name][0]
    padded = torch.nn.functional.pad(numbers.float(), (0, -numbers.shape[1] % columns))
    try:
        return torch.from_numpy(gguf.quantize(padded.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    except NotImplementedError as error:
        raise GeometryError(f"Weights can't be turned into {name} here; use a file that has them so.") from error


def split(name: str, blocks: torch.Tensor) -> "Parts":
    """uint8 [rows, blocks, bytes of a block] → codes [rows, columns] and factors [rows, blocks or sub-blocks]."""
    from .blocks import Parts

    parts = [None if part is None else part.flatten(1) for part in _SPLIT[name](blocks)]
    return Parts(*parts)  # type: ignore[arg-type]


_Split: TypeAlias = tuple[torch.Tensor | None, ...]


def _f16(raw: torch.Tensor) -> torch.Tensor:
    return raw.contiguous().view(torch.float16)


def _halves(raw: torch.Tensor) -> torch.Tensor:
    """[…, n] bytes → […, 2 n] codes: the lower halves, then the upper ones."""
    return torch.cat([raw & 15, raw >> 4], -1)


def _bits(raw: torch.Tensor) -> torch.Tensor:
    """[…, 4] bytes → […, 32]: bit k of a little-endian word."""
    return (raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _q8_0(b: torch.Tensor) -> _Split:
    return b[..., 2:], _f16(b[..., :2])


def _q4_0(b: torch.Tensor) -> _Split:
    return _halves(b[..., 2:]), _f16(b[..., :2])


def _q4_1(b: torch.Tensor) -> _Split:
    return _halves(b[..., 4:]), _f16(b[..., :2]), _f16(b[..., 2:4])


def _q5_0(b: torch.Tensor) -> _Split:
    return _halves(b[..., 6:]) | _bits(b[..., 2:6]) << 4, _f16(b[..., :2])


def _q5_1(b: torch.Tensor) -> _Split:
    return _halves(b[..., 8:]) | _bits(b[..., 4:8]) << 4, _f16(b[..., :2]), _f16(b[..., 2:4])


def _two_bits(raw: torch.Tensor) -> torch.Tensor:
    """64 bytes → 256 codes: each 32 bytes hold 4 x 32 columns, from the lowest bits up."""
    rows = raw.unflatten(-1, (2, 32))
    return torch.cat([rows >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)


def _planes_of_bits(raw: torch.Tensor) -> torch.Tensor:
    """32 bytes → 256: bit k of byte l is column 32 k + l."""
    return torch.cat([raw >> shift & 1 for shift in range(8)], -1)


def _q2_k(b: torch.Tensor) -> _Split:
    return _two_bits(b[..., 16:80]), _f16(b[..., 80:82]), _f16(b[..., 82:84]), b[..., :16] & 15, b[..., :16] >> 4


def _q3_k(b: torch.Tensor) -> _Split:
    codes = _two_bits(b[..., 32:96]) | _planes_of_bits(b[..., :32]) << 2
    packed = b[..., 96:108]
    high = torch.cat([packed[..., 8:] >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    scales = (_halves(packed[..., :8]) | high << 4) - 32  # wraps, as int8 does
    return codes, _f16(b[..., 108:]), None, scales.view(torch.int8)


def _six(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes → the scales and the minimums of 8 sub-blocks."""
    first, second, both = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([first & 63, both & 15 | (first >> 6) << 4], -1)
    return scales, torch.cat([second & 63, both >> 4 | (second >> 6) << 4], -1)


def _pairs_of_32(raw: torch.Tensor) -> torch.Tensor:
    """128 bytes → 256 codes: each 32 bytes hold 64 columns."""
    return _halves(raw.unflatten(-1, (4, 32))).flatten(-2)


def _q4_k(b: torch.Tensor) -> _Split:
    return _pairs_of_32(b[..., 16:]), _f16(b[..., :2]), _f16(b[..., 2:4]), *_six(b[..., 4:16])


def _q5_k(b: torch.Tensor) -> _Split:
    codes = _pairs_of_32(b[..., 48:]) | _planes_of_bits(b[..., 16:48]) << 4
    return codes, _f16(b[..., :2]), _f16(b[..., 2:4]), *_six(b[..., 4:16])


def _q6_k(b: torch.Tensor) -> _Split:
    low = _halves(b[..., :128].unflatten(-1, (2, 64)))
    high = b[..., 128:192].unflatten(-1, (2, 32))
    upper = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    return (low | upper << 4).flatten(-2), _f16(b[..., 208:]), None, b[..., 192:208].view(torch.int8)


def _iq4_xs(b: torch.Tensor) -> _Split:
    high = torch.cat([b[..., 2:3] >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    upper = torch.cat([b[..., 3:4] >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    low = torch.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], -1).flatten(-2)
    scales = (low | torch.cat([high, upper], -1) << 4) - 32
    return _halves(b[..., 8:].unflatten(-1, (8, 16))).flatten(-2), _f16(b[..., :2]), None, scales.view(torch.int8)


_SPLIT: dict[str, Callable[[torch.Tensor], _Split]] = {
    "q8_0": _q8_0, "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "iq4_nl": _q4_0, "q2_k": _q2_k,
    "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "iq4_xs": _iq4_xs,
}  # fmt: skip
