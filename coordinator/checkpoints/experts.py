"""What a layer's experts compute, found from transformers' experts module by data and by probing.

The module's flags say how its weights are laid out. What its gate computes is not written anywhere, so it is
measured: the module's own function runs on fixed numbers (far beyond any bound too) and is compared with what each
candidate `ExpertSpec` would give. A function that no candidate matches is an error that names the family.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch

from moehive.kernels.geometry import Activation, ExpertSpec, Format
from moehive.kernels.reference import intermediate

from ..types import CoordinatorError

if TYPE_CHECKING:
    from .architecture import ExpertsModule

FORMATS: dict[torch.dtype, Format] = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_QUICK_GELU_ALPHA = 1.702  # x * sigmoid(1.702 x) approximates gelu; gpt-oss has it too


@dataclass(frozen=True, slots=True)
class NormLayout:
    """The norm after an expert: the name of its weight, and what is added to it (0 or 1) before it scales."""

    name: str
    offset: float


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """A layer's spec, and how its tensors lie in the model: `names` are those of `spec.tensors`, in that order."""

    spec: ExpertSpec
    names: tuple[str, ...]
    transposed: bool  # projections are [in, out]
    interleaved: bool  # gate's and up's rows take turns
    norm: NormLayout | None


def layout_of(family: str, experts: "ExpertsModule", dtype: torch.dtype) -> ExpertLayout:
    """The layout of one layer's experts whose weights are computed in `dtype`.

    Raises CoordinatorError, naming the family, for experts that ExpertSpec cannot describe.
    """
    module = experts.module
    if dtype not in FORMATS:
        raise CoordinatorError(f"{family} in {dtype} is not supported; give f32, bf16 or f16.")
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    if module.has_bias:
        names = [names[0], f"{names[0]}_bias", names[1], f"{names[1]}_bias"]
    parameters = dict(module.named_parameters())
    norm, eps = _norm(family, module) if getattr(module, "has_post_expert_norm", False) else (None, None)
    if norm is not None:
        names.append(norm.name)
    if set(parameters) != set(names):
        strange = ", ".join(sorted(set(parameters) ^ set(names)))
        raise CoordinatorError(f"The experts of {family} have tensors of another kind than is supported: {strange}.")
    down = parameters["down_proj"].shape  # [experts, hidden, intermediate], or its last two the other way round
    hidden, intermediate = (down[2], down[1]) if module.is_transposed else (down[1], down[2])
    plain = ExpertSpec(
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation="silu",
        gated=module.has_gate,
        bias=module.has_bias,
        post_norm_eps=eps,
        format=FORMATS[dtype],
    )
    spec = next((candidate for candidate in _candidates(plain, module) if _matches(family, module, candidate)), None)
    if spec is None:
        raise CoordinatorError(f"The experts of {family} use an activation or a gate that is not supported.")
    return ExpertLayout(spec, tuple(names), module.is_transposed, not module.is_concatenated, norm)


def _candidates(plain: ExpertSpec, module: Any) -> Iterator[ExpertSpec]:
    """The specs to try, plain ones first. Bounds and factors are the numbers that the module itself keeps."""
    owners = [owner for owner in (module, getattr(module, "act_fn", None)) if owner is not None]
    numbers = {
        name: float(value)
        for owner in owners
        for name, value in getattr(owner, "__dict__", {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    limits = [None, *sorted({value for name, value in numbers.items() if "limit" in name or "clamp" in name})]
    alphas = [1.0, *sorted({value for name, value in numbers.items() if "alpha" in name} | {_QUICK_GELU_ALPHA})]
    offsets = (0.0, 1.0) if plain.gated else (0.0,)
    for limit, alpha, offset, after in itertools.product(limits, alphas, offsets, (False, True)):
        if limit is None and after:
            continue
        for activation in get_args(Activation):
            if alpha == 1.0 or activation == "silu":
                yield replace(
                    plain,
                    activation=activation,
                    limit=limit,
                    alpha=alpha,
                    up_offset=offset,
                    limit_after_activation=after,
                )


def _matches(family: str, module: Any, candidate: ExpertSpec) -> bool:
    """Whether the module's own function gives what a candidate would, on a fixed grid of numbers."""
    grid = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-1000.0, -100.0, -30.0, 30.0, 100.0, 1000.0])])
    if candidate.gated:
        gate, up = (part.reshape(-1) for part in torch.meshgrid(grid, grid, indexing="ij"))
        projected = torch.cat([gate, up])[None]
        given = projected if module.is_concatenated else torch.stack([gate, up], -1).reshape(1, -1)
    else:
        given = projected = grid[None]
    try:
        measured = module._apply_gate(given) if module.has_gate else module.act_fn(given)
    except Exception as error:  # transformers' module may fail in any way on numbers that it does not expect
        raise CoordinatorError(f"The experts of {family} use a gate that cannot be measured: {error}") from error
    expected = intermediate(candidate, projected)
    return measured.shape == expected.shape and torch.allclose(measured.float(), expected, rtol=1e-5, atol=1e-5)


def _norm(family: str, module: Any) -> tuple[NormLayout, float]:
    """Which RMS norm `post_expert_norm` is, measured on fixed numbers, and its epsilon."""
    norm = copy.deepcopy(module.post_expert_norm).to_empty(device="cpu").float()
    names = [name for name, _ in norm.named_parameters()]
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if len(names) == 1 and isinstance(eps, float):
        weight = norm.get_parameter(names[0])
        with torch.no_grad():
            weight.copy_(torch.linspace(-0.5, 2.0, weight.numel()))
            x = torch.linspace(-3, 2, weight.numel())[None]
            measured = norm(x)
            for offset in (0.0, 1.0):
                scaled = x * (weight + offset)
                expected = scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps)
                if torch.allclose(measured, expected, rtol=1e-5, atol=1e-5):
                    return NormLayout(f"post_expert_norm.{names[0]}", offset), eps
    raise CoordinatorError(f"The experts of {family} end in a norm that is not supported.")


def canonical(layout: ExpertLayout, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One expert's tensors as `ExpertSpec.tensors` wants them.

    `parts` are the model's own, by their names in the experts module: [1, ...] each, but a norm's weight [hidden].
    """
    result: dict[str, torch.Tensor] = {}
    for place, name in zip(layout.spec.tensors, layout.names, strict=True):
        tensor = parts[name]
        if place.name == "post_norm":
            assert layout.norm is not None
            result[place.name] = tensor.float() + layout.norm.offset
            continue
        result[place.name] = arrange(layout, place.name, tensor[0])
    return result


def arrange(layout: ExpertLayout, place: str, tensor: torch.Tensor) -> torch.Tensor:
    """One expert's projection or bias, [...], as the tensor `place` of `ExpertSpec.tensors` wants it."""
    if layout.transposed and tensor.dim() == 2:
        tensor = tensor.T
    if layout.interleaved and place.startswith("up"):
        tensor = torch.cat([tensor[0::2], tensor[1::2]])
    return tensor
