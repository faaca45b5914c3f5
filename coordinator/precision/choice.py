"""A model's experts within a budget of bytes, from calibration to the blobs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moehive.kernels.geometry import ExpertId, LayerGeometry, Manifest
from moehive.kernels.ops import ExpertOps

from ..models.base import Trunk
from ..types import CoordinatorError
from .calibration import LayerInputs
from .encode import encode
from .forward import Experts, Read
from .plan import Precision, Progress, calibrate, measure, plan, smallest


@dataclass(frozen=True, slots=True)
class BudgetChoice:
    """What was chosen, and the inputs that its quantizer works with."""

    manifest: Manifest  # as the source has it
    precision: Precision
    inputs: list[LayerInputs]

    @property
    def layers(self) -> tuple[LayerGeometry, ...]:
        """The layers as they are to be."""
        return self.precision.layers

    def encode(self, expert: ExpertId, blob: torch.Tensor) -> torch.Tensor:
        """An expert's blob, uint8, in its new formats. May be called from several threads."""
        old, new = (layers[expert.layer].spec_of(expert.expert) for layers in (self.manifest.layers, self.layers))
        return encode(old, blob, new, (self.inputs[expert.layer], expert.expert))


def choose_formats(
    manifest: Manifest,
    read: Read,
    trunk: Trunk,
    texts: Sequence[torch.Tensor],
    budget: int,
    memory: int,
    threads: int,
    progress: Progress,
) -> BudgetChoice:
    """`budget`: bytes of all experts; `memory`: bytes of experts that may be kept while the text is run.

    Raises CoordinatorError if the smallest formats take more.
    """
    least = sum(smallest(layer.spec_of(e)) for layer in manifest.layers for e in range(layer.experts))
    if least > budget:
        raise CoordinatorError(
            f"The experts take at least {least / 1e9:.2f} GB, and the budget leaves them {max(0, budget) / 1e9:.2f} "
            "GB; give a larger budget."
        )
    experts = Experts(manifest, read, ExpertOps(threads), memory)
    calibrated = calibrate(trunk, experts, texts, progress)
    chosen = plan(measure(manifest, read, calibrated, progress), budget)
    assert chosen is not None
    return BudgetChoice(manifest, chosen, calibrated.inputs)
