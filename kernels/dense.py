"""Experts with many tokens: torch's matrix products in f32, weights widened a few rows at a time."""

from collections.abc import Collection, Mapping

import torch
from torch.nn import functional as F

from .blob import decode_tensor
from .geometry import FLOAT_FORMATS, PLAIN_BYTES, ExpertSpec, TensorPlace
from .reference import as_multiplied, intermediate, post_norm

# f32 bytes of weights widened at once: stays in the last-level cache, and bounds the memory beside the blob.
_WIDENED_BYTES = 4 << 20


def quicker_with_many(kernel: str) -> Collection[str]:
    """Formats whose products with many tokens take less time here than by a kernel of the native library."""
    return FLOAT_FORMATS if kernel == "avx512_bf16" else PLAIN_BYTES.keys()


def expert_forward(spec: ExpertSpec, tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What `reference.expert_forward` returns, f32 [tokens, hidden], for `x` f32 [tokens, hidden]."""
    places = {place.name: place for place in spec.tensors}
    projected = _linear(places["up"], x, tensors["up"], tensors.get("up_bias"))
    y = _linear(places["down"], intermediate(spec, projected), tensors["down"], tensors.get("down_bias"))
    return post_norm(spec, tensors, y)


def _linear(place: TensorPlace, x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    x = as_multiplied(place.format, x)
    if place.format == "f32" or place.format not in PLAIN_BYTES:
        return F.linear(x, decode_tensor(place, stored), bias)
    rows, columns = stored.shape
    step = max(1, _WIDENED_BYTES // (4 * columns))
    out = torch.empty(len(x), rows)
    for first in range(0, rows, step):
        out[:, first : first + step] = x @ stored[first : first + step].float().T
    return out if bias is None else out.add_(bias)
