"""Weights in the CPU's layout (16 rows side by side), as the sources that `planes.lay_out` takes.

The bits of codes and scales stay; only their order changes. Done once, when an expert or a layer moves to the GPU.
"""

from collections.abc import Sequence

import torch

from ..formats.blocks import BLOCK_FORMATS
from ..formats.quantized import FP8_ROWS, QUANTIZED_FORMATS, Fp8Format, Int4Format, Mxfp4Format
from ..formats.registry import FORMATS
from ..geometry import PLAIN_BYTES, ExpertSpec, TensorPlace
from ..linear import LinearWeights
from .planes import PlanesError, planes

Source = dict[str, torch.Tensor]


def expert_sources(spec: ExpertSpec, blob: torch.Tensor) -> tuple[Source, Source, Source]:
    """`up`, `down` and `floats` as `GpuExperts.load` takes them, of a blob uint8 [spec.nbytes] on the CPU.

    Raises PlanesError for an expert that a GPU does not compute.
    """
    found: dict[str, Source] = {}
    floats: Source = {}
    for place in spec.tensors:
        raw = blob[place.offset : place.offset + place.nbytes]
        if place.name in ("up", "down"):
            found[place.name] = _projection(place, raw)
        else:
            floats[place.name] = raw.view(torch.float32)
    return found["up"], found["down"], floats


def linear_source(matrices: Sequence[LinearWeights]) -> Source:
    """Some linear layers of one format and one input, their rows one after the other, as one source."""
    parts = [_stored(one) for one in matrices]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def linear_bytes(weights: LinearWeights) -> int:
    """Bytes of GPU memory that a linear layer takes. Raises PlanesError for a format without a GPU kernel."""
    bias = 0 if weights.bias is None else weights.bias.nbytes
    return planes(weights.format, weights.rows, weights.columns).nbytes + bias


def _stored(weights: LinearWeights) -> Source:
    if weights.is_plain:
        return {"values": weights.stored}
    return _matrix(weights.format, weights.stored, (weights.rows, weights.columns))


def _projection(place: TensorPlace, raw: torch.Tensor) -> Source:
    """One projection; a gated one's two matrices become one, gate's rows first."""
    fmt, (rows, columns) = place.format, place.shape
    if fmt in PLAIN_BYTES:
        return {"values": FORMATS[fmt].view(raw, place.shape)}
    if fmt == "fp8_block" and place.matrices > 1 and rows // place.matrices % FP8_ROWS:
        raise PlanesError(
            f"On a GPU the intermediate size of FP8 experts must be a multiple of {FP8_ROWS}, not "
            f"{rows // place.matrices}."
        )
    parts = [_matrix(fmt, part, (rows // place.matrices, columns)) for part in raw.chunk(place.matrices)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _matrix(fmt: str, stored: torch.Tensor, shape: tuple[int, int]) -> Source:
    if fmt in BLOCK_FORMATS:
        codes, d, m, scales, minimums = BLOCK_FORMATS[fmt].parts(stored, shape)
        source = {"values": codes}
        if scales is None:
            return {**source, "scales": d}
        source["scales"] = scales
        if m is None:
            return {**source, "factors": d}
        assert minimums is not None
        return {**source, "minimums": minimums, "factors": torch.stack([d, m], 2).flatten(1)}
    known = QUANTIZED_FORMATS[fmt]
    if isinstance(known, Int4Format):
        int4 = known.unpack(stored, shape)
        return {"values": int4.codes, "scales": int4.scales, "zeros": int4.zeros}
    if isinstance(known, Mxfp4Format):
        mxfp4 = known.unpack(stored, shape)
        return {"values": mxfp4.codes, "scales": mxfp4.scales}
    assert isinstance(known, Fp8Format)
    fp8 = known.unpack(stored, shape)
    return {"values": fp8.codes, "scales": fp8.scales}
