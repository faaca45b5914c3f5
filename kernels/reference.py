"""Plain torch, slow and obvious: what every kernel must return, in f32."""

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from .blob import decode_tensor
from .geometry import ROUNDED_FORMATS, ExpertSpec


def expert_forward(
    spec: ExpertSpec, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, rounded: bool = True
) -> torch.Tensor:
    """One expert's output, f32 [tokens, hidden], for `x` [tokens, hidden] of any float dtype.

    `tensors` are stored forms as `blob.tensor_views` returns them. Without `rounded` all vectors stay f32, as one
    token's do on a GPU.
    """
    weights = {place.name: decode_tensor(place, tensors[place.name]) for place in spec.tensors}
    formats = (spec.format, spec.back_format) if rounded else ("f32", "f32")
    projected = F.linear(as_multiplied(formats[0], x.float()), weights["up"], weights.get("up_bias"))
    middle = as_multiplied(formats[1], intermediate(spec, projected))
    return post_norm(spec, tensors, F.linear(middle, weights["down"], weights.get("down_bias")))


def as_multiplied(fmt: str, x: torch.Tensor) -> torch.Tensor:
    """Vectors, f32, as a format's products take them: those of bf16 and FP8 weights round them to bf16."""
    return x.bfloat16().float() if fmt in ROUNDED_FORMATS else x


def intermediate(spec: ExpertSpec, projected: torch.Tensor) -> torch.Tensor:
    """Between the projections: f32 [tokens, projected_size] → f32 [tokens, intermediate]."""
    if not spec.gated:
        return _activate(spec, projected)
    gate, up = projected.chunk(2, dim=-1)
    if spec.limit is None:
        return _activate(spec, gate) * (up + spec.up_offset)
    up = up.clamp(-spec.limit, spec.limit)
    if spec.limit_after_activation:
        return _activate(spec, gate).clamp(max=spec.limit) * (up + spec.up_offset)
    return _activate(spec, gate.clamp(max=spec.limit)) * (up + spec.up_offset)


def post_norm(spec: ExpertSpec, tensors: Mapping[str, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    """The norm after the expert, if it has one: f32 [tokens, hidden], scaled first, then normalized."""
    if spec.post_norm_eps is None:
        return y
    z = y * tensors["post_norm"]
    return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + spec.post_norm_eps)


def _activate(spec: ExpertSpec, z: torch.Tensor) -> torch.Tensor:
    match spec.activation:
        case "silu":
            return z * torch.sigmoid(spec.alpha * z)
        case "gelu":
            return F.gelu(z)
        case "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        case "relu":
            return F.relu(z)
        case "relu2":
            return F.relu(z).square()
