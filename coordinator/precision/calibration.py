"""What each expert is multiplied with: a layer's inputs on calibration text, and what follows for its projections."""

from dataclasses import dataclass

import torch

from moehive.kernels.blob import decode_tensor, tensor_views
from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.reference import intermediate

_OTHERS = 128  # tokens of other experts that count a little, so that an expert nobody asked is not left to chance
_OTHERS_SHARE = 0.05  # how much all of them together count, by the expert's own


@dataclass(frozen=True, slots=True, eq=False)
class LayerInputs:
    """One MoE layer on the text: `hidden` bf16 [T, hidden], `ids` int64 [T, k], `weights` f32 [T, k]."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors f32 [n, hidden] that the expert is asked with, and how much each counts, f32 [n], in all 1 or less.

        A token counts as the square of its routing weight, since that is how an error of its output does.
        """
        mine = self.ids == expert
        counts = (self.weights.square() * mine).sum(1)
        own = counts.nonzero()[:, 0]
        rest = (counts == 0).nonzero()[:, 0]
        rest = rest[:: max(1, len(rest) // _OTHERS)][:_OTHERS]
        total = float(counts.sum()) or float(self.weights.square().mean())
        share = torch.full((len(rest),), _OTHERS_SHARE * total / max(1, len(rest)))
        both = torch.cat([own, rest])
        return self.hidden[both].float(), torch.cat([counts[own], share]) / len(self.hidden)


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """One projection of an expert, as a quantizer sees it.

    `weight` f32 [rows, columns]; `moments` f32 [columns, columns]: of the vectors that it is multiplied with,
    weighted as they count; `row_gain` f32 [rows]: how much a square of the row's error counts in the expert's output.
    """

    name: str  # of `ExpertSpec.tensors`
    weight: torch.Tensor
    moments: torch.Tensor
    row_gain: torch.Tensor

    def damage(self, other: torch.Tensor, rows: slice) -> float:
        """The mean square by which the layer's output changes when `rows` of the weight become `other`."""
        error = other - self.weight[rows]
        return float((((error @ self.moments) * error).sum(1) * self.row_gain[rows]).sum())


def projections(spec: ExpertSpec, blob: torch.Tensor, inputs: LayerInputs, expert: int) -> list[Projection]:
    """An expert's projections. What goes on between them is linearized where the text's vectors are."""
    x, counts = inputs.of(expert)
    views = tensor_views(spec, blob)
    tensors = {place.name: decode_tensor(place, views[place.name]) for place in spec.tensors}
    with torch.enable_grad():
        projected = torch.nn.functional.linear(x, tensors["up"], tensors.get("up_bias")).requires_grad_()
        middle = intermediate(spec, projected)
        (slopes,) = torch.autograd.grad(middle.sum(), projected)
    middle = middle.detach()
    reach = tensors["down"].square().sum(0)  # [intermediate]
    felt = (slopes.square() * counts[:, None]).sum(0) / counts.sum().clamp_min(1e-30)
    gain = felt * (reach.repeat(2) if spec.gated else reach)
    return [
        Projection("up", tensors["up"], (x * counts[:, None]).T @ x, gain),
        Projection("down", tensors["down"], (middle * counts[:, None]).T @ middle, torch.ones(len(tensors["down"]))),
    ]
