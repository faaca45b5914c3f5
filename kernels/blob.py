"""An expert's blob: one block of bytes with all its tensors, laid out as `ExpertSpec.tensors` says."""

from collections.abc import Mapping, Sequence

import torch

from .formats.file_rows import pack_file_rows
from .formats.registry import FORMATS
from .geometry import ALIGNMENT, ExpertSpec, GeometryError, TensorPlace


def empty_blob(nbytes: int) -> torch.Tensor:
    """Uninitialized uint8 [nbytes] on the CPU whose first byte is aligned to 64."""
    memory = torch.empty(nbytes + ALIGNMENT - 1, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]


def build_blob(spec: ExpertSpec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Encodes an expert's canonical tensors, named and shaped as in `spec.tensors`, of any float dtype.

    Returns uint8 [spec.nbytes], aligned to 64, padding zeroed, so equal experts have equal bytes. Raises
    GeometryError if a tensor is missing, not wanted, not of floats, or of the wrong shape.
    """
    wanted = {place.name for place in spec.tensors}
    if tensors.keys() != wanted:
        raise GeometryError(
            f"This expert needs the tensors {', '.join(sorted(wanted))}, not {', '.join(sorted(tensors)) or 'none'}."
        )
    blob = empty_blob(spec.nbytes)
    end = 0
    for place in spec.tensors:
        tensor = tensors[place.name]
        if tuple(tensor.shape) != place.shape or not tensor.is_floating_point():
            raise GeometryError(
                f"The expert's tensor {place.name} must hold floats of shape {list(place.shape)}, "
                f"not {str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}."
            )
        blob[end : place.offset].zero_()
        end = place.offset + place.nbytes
        encode_tensor(place, tensor.detach(), blob[place.offset : end])
    blob[end:].zero_()
    return blob


def encode_tensor(place: TensorPlace, tensor: torch.Tensor, out: torch.Tensor) -> None:
    """Writes numbers, shaped as `place` says, into `out` (uint8 [place.nbytes]) in its format."""
    step = place.nbytes // place.matrices
    for number, matrix in enumerate(tensor.chunk(place.matrices)):
        FORMATS[place.format].encode(matrix, out[number * step : (number + 1) * step])


def pack_blob(
    spec: ExpertSpec, rows: Mapping[str, Sequence[torch.Tensor]], floats: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Lays an expert out whose projections come as a file's block rows.

    `rows` has `up` (gate and up, or up alone) and `down`: uint8 [rows, bytes of a row] for each matrix, in the
    formats that `spec` names; a projection in a plain format is among `floats` instead, with biases and norm. Returns
    uint8 [spec.nbytes], aligned to 64. Raises GeometryError for another shape.
    """
    blob = empty_blob(spec.nbytes)
    end = 0
    for place in spec.tensors:
        blob[end : place.offset].zero_()
        end = place.offset + place.nbytes
        out = blob[place.offset : end]
        if place.name not in rows:
            encode_tensor(place, floats[place.name], out)
            continue
        step = place.nbytes // place.matrices
        for number, matrix in enumerate(rows[place.name]):
            if len(matrix) != place.shape[0] // place.matrices:
                raise GeometryError(f"The expert's matrix {place.name} has {len(matrix)} rows; it can't.")
            pack_file_rows(place.format, matrix, place.shape[1], out[number * step : (number + 1) * step])
    blob[end:].zero_()
    return blob


def decode_tensor(place: TensorPlace, stored: torch.Tensor) -> torch.Tensor:
    """The f32 numbers, shaped as `place` says, that a tensor of `tensor_views` means."""
    if place.matrices == 1:
        return FORMATS[place.format].decode(stored, place.shape)
    rows, columns = place.shape
    shape = (rows // place.matrices, columns)
    return torch.cat([FORMATS[place.format].decode(part, shape) for part in stored.chunk(place.matrices)])


def tensor_views(spec: ExpertSpec, blob: torch.Tensor) -> dict[str, torch.Tensor]:
    """The blob's tensors by name, each in its stored form, sharing the blob's memory.

    Raises GeometryError as `check_blob`.
    """
    check_blob(spec, blob)
    return {
        place.name: FORMATS[place.format].view(blob[place.offset : place.offset + place.nbytes], place.shape)
        for place in spec.tensors
    }


def check_blob(spec: ExpertSpec, blob: torch.Tensor) -> None:
    """Raises GeometryError unless `blob` is uint8 [spec.nbytes] on the CPU, contiguous, aligned to 64."""
    if blob.dtype != torch.uint8 or blob.dim() != 1 or not blob.is_contiguous() or blob.device.type != "cpu":
        raise GeometryError("An expert's blob must be one contiguous row of bytes (uint8) in the CPU's memory.")
    if blob.numel() != spec.nbytes:
        raise GeometryError(f"An expert's blob must have {spec.nbytes} bytes, not {blob.numel()}.")
    if blob.data_ptr() % ALIGNMENT:
        raise GeometryError(f"An expert's blob must start at a multiple of {ALIGNMENT} bytes in memory.")
