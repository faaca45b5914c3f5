"""A model within a budget of bytes, from calibration to the formats."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moehive.kernels.geometry import Format, Manifest
from moehive.kernels.ops import ExpertOps

from ..models.base import Trunk
from ..sizes import in_bytes
from ..types import CoordinatorError
from .candidates import Progress
from .forward import Experts, Read
from .inputs import KeptInputs
from .plan import Precision, calibrate, measure, plan, probes_of, smallest
from .trunk_parts import TrunkMatrices, TrunkPart


@dataclass(frozen=True, slots=True)
class TrunkChoice:
    """A matrix of the trunk that gets another format."""

    part: TrunkPart
    format: Format


@dataclass(frozen=True, slots=True)
class BudgetChoice:
    """What was chosen, and the inputs that its quantizer works with."""

    precision: Precision
    inputs: KeptInputs
    trunk: tuple[TrunkChoice, ...]


def choose_formats(
    manifest: Manifest,
    read: Read,
    trunk: TrunkMatrices | Trunk,
    texts: Sequence[torch.Tensor],
    budget: int,
    memory: int,
    threads: int,
    folder: Path,
    progress: Progress,
) -> BudgetChoice:
    """`budget`: bytes of all experts, and of the trunk's matrices that may get another format (of a Trunk: none).

    `memory`: bytes of experts that may be kept while the text is run; `folder`, made here, takes the layers' inputs.
    Raises CoordinatorError if the smallest formats take more, OSError.
    """
    matrices = trunk if isinstance(trunk, TrunkMatrices) else None
    least = sum(smallest(layer.spec_of(e)) for layer in manifest.layers for e in range(layer.experts))
    if matrices is not None:
        least += matrices.least_bytes
    if least > budget:
        raise CoordinatorError(
            f"What may be rounded takes at least {in_bytes(least)}, and the budget leaves it "
            f"{in_bytes(max(0, budget))}; give a larger budget."
        )
    experts = Experts(manifest, read, ExpertOps(threads), memory)
    run = trunk.trunk if isinstance(trunk, TrunkMatrices) else trunk
    folder.mkdir()
    calibrated = calibrate(run, experts, texts, folder, progress)
    parts = [] if matrices is None else matrices.measure(experts, texts, probes_of(texts), progress)
    chosen = plan(measure(manifest, read, calibrated, progress), budget, parts)
    assert chosen is not None
    other = tuple(TrunkChoice(part, chosen.trunk[part.name]) for part in parts if part.name in chosen.trunk)
    return BudgetChoice(chosen, calibrated.inputs, other)
