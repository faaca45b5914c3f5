"""Routed experts of a quantized checkpoint in their own bits: whole rows of stored matrices, never expanded.

Where a row of an expert's projection lies in the checkpoint is not known from tables: the conversion
is run on numbered entries (`ExpertParameter.origins`), and what it makes of them says which rows of which stored
matrix become gate, up and down. Where they do not become whole rows, or share scales with other rows, the projection
is expanded to the checkpoint's dtype instead, and that is said.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from moehive.kernels.blob import empty_blob, encode_tensor
from moehive.kernels.geometry import ExpertSpec, Format

from ...types import CoordinatorError
from ..expert_parameter import ExpertParameter
from ..experts import ExpertLayout, arrange
from .matrices import whole_blocks
from .tensor import QuantizedTensor

_PROJECTIONS = ("up", "down")


@dataclass(frozen=True, slots=True, eq=False)
class OwnBits:
    """Where one matrix of each of a layer's experts lies: the pattern of the parameter, and the stored rows."""

    parameter: ExpertParameter
    pattern: int
    rows: torch.Tensor | None  # int64; None: all of them, in order
    format: Format


@dataclass(slots=True)
class OwnBitsFinder:
    """Finds a model's projections that stay as they are stored. `expanded`: names of formats of those that can't."""

    expanded: set[str] = field(default_factory=set)
    _known: dict[tuple[object, ...], list[tuple[int, torch.Tensor]] | None] = field(default_factory=dict)

    def find(self, layout: ExpertLayout, parameters: Mapping[str, ExpertParameter]) -> dict[str, list[OwnBits]]:
        """For each projection that is kept, its matrices: gate and up, or one."""
        kept: dict[str, list[OwnBits]] = {}
        for place, name in zip(layout.spec.tensors, layout.names, strict=True):
            parameter = parameters[name]
            tensors = [tensor for pattern in parameter.sources for tensor in pattern]
            if place.name not in _PROJECTIONS or not any(isinstance(t, QuantizedTensor) for t in tensors):
                continue
            found = self._matrices(layout, place.name, parameter)
            if found is None:
                self.expanded |= {t.parts[0].get_dtype() for t in tensors if isinstance(t, QuantizedTensor)}
            else:
                kept[place.name] = found
        return kept

    def spec_of(self, plain: ExpertSpec, kept: Mapping[str, list[OwnBits]]) -> ExpertSpec:
        """The spec with the formats that are kept."""
        up, down = (kept[place][0].format if place in kept else plain.format for place in _PROJECTIONS)
        return replace(plain, format=up, down_format=None if down == up else down)

    def _matrices(self, layout: ExpertLayout, place: str, parameter: ExpertParameter) -> list[OwnBits] | None:
        if not parameter.by_expert:
            return None
        key = (place, *parameter.kind)
        if key not in self._known:
            self._known[key] = _rows(layout, place, parameter)
        pieces = self._known[key]
        if pieces is None:
            return None
        found: list[OwnBits] = []
        for pattern, rows in pieces:
            tensors = parameter.sources[pattern]
            formats = {tensor.format if isinstance(tensor, QuantizedTensor) else None for tensor in tensors}
            format = formats.pop()
            first = tensors[0]
            if formats or format is None or not isinstance(first, QuantizedTensor):
                return None
            if not (first.row_block == 1 or whole_blocks(rows, first.row_block)):
                return None
            total = first.shape[-1 if first.transposed else -2]
            whole = len(rows) == total and torch.equal(rows, torch.arange(total))
            found.append(OwnBits(parameter, pattern, None if whole else rows, format))
        return found if len({piece.format for piece in found}) == 1 else None


def blob_of(
    layout: ExpertLayout, kept: Mapping[str, list[OwnBits]], parts: Mapping[str, torch.Tensor], expert: int
) -> torch.Tensor:
    """One expert's blob, uint8 [spec.nbytes]: `kept` in their own bits, `parts` (canonical takes them) as numbers.

    Raises CoordinatorError when a file can no longer be read.
    """
    blob = empty_blob(layout.spec.nbytes).zero_()
    for place, name in zip(layout.spec.tensors, layout.names, strict=True):
        out = blob[place.offset : place.offset + place.nbytes]
        if place.name in kept:
            step = place.nbytes // place.matrices
            for number, piece in enumerate(kept[place.name]):
                tensor, at = piece.parameter.tensor_of(piece.pattern, expert)
                if not isinstance(tensor, QuantizedTensor):
                    raise CoordinatorError(f"{tensor.path} holds {tensor.name} unlike the other experts' tensors.")
                tensor.pack(at, piece.rows, piece.format, out[number * step : (number + 1) * step])
        elif place.name == "post_norm":
            assert layout.norm is not None
            encode_tensor(place, parts[name].float() + layout.norm.offset, out)
        else:
            encode_tensor(place, arrange(layout, place.name, parts[name][0]), out)
    return blob


def _rows(layout: ExpertLayout, place: str, parameter: ExpertParameter) -> list[tuple[int, torch.Tensor]] | None:
    """For each matrix of a projection, its pattern and its rows there; None where it is not made of whole rows."""
    numbered = arrange(layout, place, parameter.origins()[0])
    matrices = 2 if place == "up" and layout.spec.gated else 1
    starts, strides = [], []
    start = 0
    for tensors in parameter.sources:
        high, wide = tensors[0].shape[-2:]
        turned = isinstance(tensors[0], QuantizedTensor) and tensors[0].transposed
        starts.append(start)
        strides.append((1, wide) if turned else (wide, 1))  # of a stored row, of a stored column
        start += high * wide
    found = []
    for matrix in numbered.chunk(matrices):
        first = matrix[:, 0].long()
        pattern = max(number for number, begin in enumerate(starts) if begin <= int(first[0]))
        by_row, by_column = strides[pattern]
        rows = (first - starts[pattern]) // by_row
        columns = torch.arange(matrix.shape[1], dtype=torch.int32) * by_column
        if not torch.equal(matrix, (starts[pattern] + rows * by_row).int()[:, None] + columns):
            return None
        found.append((pattern, rows))
    return found
