"""An expert in other formats, quantized with what is known of its inputs."""

import torch

from moehive.kernels.blob import build_blob, decode_tensor, pack_blob, tensor_views
from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.quantizers.feedback import SUB_BLOCKS, Moments, quantize

from .calibration import LayerInputs, projections


def encode(
    old: ExpertSpec, blob: torch.Tensor, new: ExpertSpec, known: tuple[LayerInputs, int] | None
) -> torch.Tensor:
    """`blob` uint8 [old.nbytes] in the formats of `new`, those of kernels/quantizers or the old: uint8 [new.nbytes].

    `known`: the layer's inputs and the expert's number; None: each column counts the same.
    """
    if old == new:
        return blob
    views = tensor_views(old, blob)
    numbers = {place.name: decode_tensor(place, views[place.name]) for place in old.tensors}
    if known is None:
        return build_blob(new, numbers)
    moments = {one.name: one.moments for one in projections(old, blob, *known)}
    rows: dict[str, list[torch.Tensor]] = {}
    for place in new.tensors:
        if place.format in SUB_BLOCKS:
            stored = quantize(place.format, numbers[place.name], Moments.of(moments[place.name]))
            rows[place.name] = list(stored.chunk(place.matrices))
    packed = pack_blob(new, rows, {name: numbers[name] for name in numbers if name not in rows})
    for place, before in zip(new.tensors, old.tensors, strict=True):  # what keeps its format keeps its bits
        if place.format == before.format:
            packed[place.offset : place.offset + place.nbytes] = blob[before.offset : before.offset + before.nbytes]
    return packed
