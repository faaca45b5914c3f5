"""A model within a budget of bytes, from calibration to the blobs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moehive.kernels.geometry import ExpertId, Format, LayerGeometry, Manifest
from moehive.kernels.ops import ExpertOps

from ..models.base import Trunk
from ..types import CoordinatorError
from .calibration import LayerInputs
from .candidates import Progress
from .encode import encode
from .forward import Experts, Read
from .plan import Precision, calibrate, measure, plan, probes_of, smallest
from .trunk_parts import TrunkMatrices, TrunkPart


@dataclass(frozen=True, slots=True)
class TrunkChoice:
    """A matrix of the trunk that gets another format."""

    part: TrunkPart
    format: Format
    matrices: TrunkMatrices

    def encode(self) -> Iterator[torch.Tensor]:
        """The matrix as kernels compute it, uint8, piece by piece."""
        return self.matrices.encode(self.part, self.format)


@dataclass(frozen=True, slots=True)
class BudgetChoice:
    """What was chosen, and the inputs that its quantizer works with."""

    manifest: Manifest  # as the source has it
    precision: Precision
    inputs: list[LayerInputs]
    trunk: tuple[TrunkChoice, ...]

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
    trunk: TrunkMatrices | Trunk,
    texts: Sequence[torch.Tensor],
    budget: int,
    memory: int,
    threads: int,
    progress: Progress,
) -> BudgetChoice:
    """`budget`: bytes of all experts, and of the trunk's matrices that may get another format (of a Trunk: none).

    `memory`: bytes of experts that may be kept while the text is run. Raises CoordinatorError if the smallest formats
    take more.
    """
    matrices = trunk if isinstance(trunk, TrunkMatrices) else None
    least = sum(smallest(layer.spec_of(e)) for layer in manifest.layers for e in range(layer.experts))
    if matrices is not None:
        least += matrices.least_bytes
    if least > budget:
        raise CoordinatorError(
            f"What may be rounded takes at least {least / 1e9:.2f} GB, and the budget leaves it "
            f"{max(0, budget) / 1e9:.2f} GB; give a larger budget."
        )
    experts = Experts(manifest, read, ExpertOps(threads), memory)
    calibrated = calibrate(trunk.trunk if isinstance(trunk, TrunkMatrices) else trunk, experts, texts, progress)
    parts = [] if matrices is None else matrices.measure(experts, texts, probes_of(texts), progress)
    chosen = plan(measure(manifest, read, calibrated, progress), budget, parts)
    assert chosen is not None
    other: tuple[TrunkChoice, ...] = ()
    if matrices is not None:
        other = tuple(
            TrunkChoice(part, chosen.trunk[part.name], matrices) for part in parts if part.name in chosen.trunk
        )
    return BudgetChoice(manifest, chosen, calibrated.inputs, other)
