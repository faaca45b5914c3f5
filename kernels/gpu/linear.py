"""Linear layers on a GPU, their weights in their own format.

Plain f32 goes to torch, whose products are exact; all others to the Triton kernel, which reads the weights as they
are stored. Layers with the same input and format are one matrix there, so that a row of all of them is one launch.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch

from ..formats.quantized import FP8_ROWS
from ..linear import LinearWeights
from . import grouped
from .experts import MANY_VECTORS, ONE_VECTOR, empty
from .from_blob import linear_source
from .planes import lay_out, planes


class GpuLinear:
    """A linear layer in a GPU's memory: f32 [tokens, columns] → f32 [tokens, rows]."""

    def __init__(
        self, fmt: str, rows: int, columns: int, source: Mapping[str, torch.Tensor], bias: torch.Tensor | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        """`source` as `planes.lay_out` takes it; `bias` f32 [rows]. Raises PlanesError."""
        self._planes = planes(fmt, rows, columns)
        self._memory = empty(self._planes.nbytes, device)
        lay_out(fmt, source, self._memory)
        self._bias = None if bias is None else bias.float().to(device)
        self._columns = columns
        self.rows = rows
        if fmt == "f32":
            self._matrix = self._memory[: 4 * rows * columns].view(torch.float32).view(rows, columns)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x` f32 [tokens, columns] on the layer's device, its rows contiguous, as those of `out` [tokens, rows]."""
        tokens, place = len(x), self._planes
        if out is None:
            out = torch.empty(tokens, place.rows, device=x.device)
        if place.format == "f32":
            torch.mm(x, self._matrix.T, out=out)
            if self._bias is not None:
                out += self._bias
        elif tokens:
            tile = 1 if tokens == 1 else 16 if tokens <= 16 else 64
            rows, step = ONE_VECTOR if tile == 1 else MANY_VECTORS
            grouped.linear[-(-place.rows // rows), -(-tokens // tile)](
                self._memory, x, out, tokens, place.rows, self._columns, place.columns, x.stride(0), out.stride(0),
                out if self._bias is None else self._bias, *place.offsets[1:],
                FMT=grouped.FORMATS.index(place.format), BIAS=self._bias is not None,
                TILE=tile, BLOCK_ROWS=rows, BLOCK_K=step,
            )  # fmt: skip
        return out


class GpuLinears:
    """Linear layers with the same input: their outputs, one after the other, are a row."""

    def __init__(self, layers: Sequence[LinearWeights], device: torch.device) -> None:
        """Lays out weights that are on the CPU. Raises PlanesError, or torch's OutOfMemoryError."""
        self._joined = [_join(part, device) for part in _same_format(layers)]
        self.rows = sum(one.rows for one in self._joined)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x` f32 [T, columns] on the layers' device, its rows contiguous → f32 [T, rows], into `out` if given."""
        if out is None:
            out = torch.empty(len(x), self.rows, device=x.device)
        end = 0
        for one in self._joined:
            one(x, out[:, end : end + one.rows])
            end += one.rows
        return out


def _same_format(layers: Sequence[LinearWeights]) -> Iterator[list[LinearWeights]]:
    """Neighbours that can be one matrix; FP8's scales are of whole blocks of rows."""
    for fmt, neighbours in groupby(layers, lambda one: one.format):
        part: list[LinearWeights] = []
        for one in neighbours:
            part.append(one)
            if fmt == "fp8_block" and one.rows % FP8_ROWS:
                yield part
                part = []
        if part:
            yield part


def _join(layers: Sequence[LinearWeights], device: torch.device) -> GpuLinear:
    first, rows = layers[0], sum(one.rows for one in layers)
    bias = None
    if any(one.bias is not None for one in layers):
        bias = torch.cat([torch.zeros(one.rows) if one.bias is None else one.bias for one in layers])
    return GpuLinear(first.format, rows, first.columns, linear_source(layers), bias, device)
