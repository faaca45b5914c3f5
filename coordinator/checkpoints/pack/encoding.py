"""An expert's blob in another format, a few rows at a time, so that no whole expert is ever widened to f32."""

from dataclasses import replace
from typing import get_args

import torch

from moehive.kernels.blob import empty_blob
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import BLOCKS, ExpertSpec, Format, GeometryError, TensorPlace, tensor_bytes

from ...settings import SettingsError

_ROWS = 128  # a multiple of what any format lays side by side: 16 rows, or 128 that share FP8's scales
_WIDENED_BYTES = 4 << 20  # of f32 numbers at once


def respecified(spec: ExpertSpec, format: Format) -> ExpertSpec:
    """`spec` with all projections in `format`."""
    return replace(spec, format=format, down_format=None)


def check_format(name: str) -> Format:
    """`name` as a format. Raises SettingsError, with those that are known."""
    for known in get_args(Format):
        if known == name:
            return known  # type: ignore[no-any-return]
    raise SettingsError(f"Unknown format {name[:40]!r}; known are keep, {', '.join(get_args(Format))}.")


def check_encodable(format: Format) -> None:
    """Raises SettingsError for a format that weights can only be read in."""
    if not _encodable(format):
        able = ", ".join(known for known in get_args(Format) if _encodable(known))
        raise SettingsError(
            f"Weights can't be turned into {format} here; give a GGUF that has them so, or choose {able}."
        )


def _encodable(format: Format) -> bool:
    columns = BLOCKS.get(format, (32, 0))[0]
    try:
        FORMATS[format].encode(torch.zeros(16, columns), empty_blob(tensor_bytes(format, 16, columns)))
    except GeometryError:
        return False
    return True


def reencode(source: ExpertSpec, blob: torch.Tensor, target: ExpertSpec) -> torch.Tensor:
    """`blob`, uint8 [source.nbytes], in the formats of `target`, a spec of the same tensors: uint8 [target.nbytes].

    Plain tensors (biases, norms) are copied. Raises GeometryError for numbers that the format can't hold.
    """
    out = empty_blob(target.nbytes)
    end = 0
    for old, new in zip(source.tensors, target.tensors, strict=True):
        out[end : new.offset].zero_()
        end = new.offset + new.nbytes
        given, wanted = blob[old.offset : old.offset + old.nbytes], out[new.offset : end]
        if old.format == new.format:
            wanted.copy_(given)
        else:
            _reencode_tensor(old, given, new, wanted)
    out[end:].zero_()
    return out


def _reencode_tensor(old: TensorPlace, given: torch.Tensor, new: TensorPlace, wanted: torch.Tensor) -> None:
    matrices = max(old.matrices, new.matrices)  # of equal size in either format
    rows, columns = new.shape[0] // matrices, new.shape[1]
    step = max(_ROWS, _WIDENED_BYTES // (4 * columns) // _ROWS * _ROWS)
    for source, target in zip(given.chunk(matrices), wanted.chunk(matrices), strict=True):
        for first in range(0, rows, step):
            shape = (min(step, rows - first), columns)
            piece = FORMATS[old.format].view(_rows(old.format, source, first, shape), shape)
            numbers = FORMATS[old.format].decode(piece, shape)
            FORMATS[new.format].encode(numbers, _rows(new.format, target, first, shape))


def _rows(format: Format, matrix: torch.Tensor, first: int, shape: tuple[int, int]) -> torch.Tensor:
    start = tensor_bytes(format, first, shape[1])
    return matrix[start : start + tensor_bytes(format, *shape)]
