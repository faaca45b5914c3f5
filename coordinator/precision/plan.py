"""Chooses the format of every expert's projections, and of the trunk's matrices (trunk_parts.py), so that the model's
output diverges least for the bytes.

The damage of a choice is estimated as a sum over projections:

    gain of the layer * mean square by which the layer's output changes

The second factor is measured for each projection and format on calibration text, with the quantizer that will write
it, on some of its rows (calibration.py). The first is how much the output's KL divergence grows for a square of
change in that layer's output: each layer in turn is rounded, and both are measured on the text. KL divergence is
quadratic in small changes, and changes of different layers are taken to be independent, so that they add up. The
choice itself is a knapsack.py, which says how far from the best choice it may be.

Sources: layer-wise second moments and error feedback as in GPTQ (Frantar et al., 2022); a layer's sensitivity
measured at the output as in HAWQ (Dong et al., 2019), with KL in place of the Hessian's trace; the importance of
columns as in llama.cpp's importance matrix.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import torch

from moehive.kernels.geometry import ExpertId, ExpertSpec, Format, LayerGeometry, Manifest
from moehive.kernels.quantizers.feedback import Moments, quantize

from ..models.base import Trunk
from .calibration import Projection, projections
from .candidates import CANDIDATES, PROBE, Progress
from .encode import encode
from .forward import Experts, Read, Ready, divergences, log_probabilities, run_through
from .inputs import KeptInputs, Recorder
from .knapsack import Option, choose
from .trunk_parts import TrunkPart, spread

_ROWS = 64  # of a projection, on which a format's error is measured
_PROBED_LAYERS = 16  # whose gain is measured; between them it is interpolated
_PROBE_TOKENS = 384  # of the text, for the gains


@dataclass(frozen=True, slots=True)
class Precision:
    """What was chosen: `layers` with each expert's formats, their bytes, the damage that is expected, nats a token.

    `trunk`: the matrices of the trunk that get another format. No choice among these formats has less expected damage
    than `bound`.
    """

    layers: tuple[LayerGeometry, ...]
    nbytes: int
    damage: float
    bound: float
    trunk: Mapping[str, Format] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """By how much, at most, the expected damage is above the least possible, as a share of itself."""
        return 1 - self.bound / self.damage if self.damage else 0.0


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A model's layers on its calibration text, and what a change in each layer does to the output."""

    inputs: KeptInputs
    gains: list[float]  # KL divergence, nats a token, for a mean square of change in the layer's output


def calibrate(
    trunk: Trunk, experts: Experts, texts: Sequence[torch.Tensor], folder: Path, progress: Progress
) -> Calibrated:
    """Runs `texts` (int64 [T] each) through the model as it is, and a part of them with one layer or another rounded.

    The layers' inputs are kept in files in `folder`. Raises OSError.
    """
    progress("Reading the text", 0, len(texts))
    recorder = Recorder(experts, folder)
    try:
        run_through(trunk, recorder, texts)
        inputs = recorder.finish()
    finally:
        recorder.close()
    probes = probes_of(texts)
    reference = list(log_probabilities(trunk, experts, probes))
    layers = len(inputs)
    probed = spread(layers, _PROBED_LAYERS)
    measured = []
    rounded = [_Rounded(experts, layer) for layer in probed]
    progress("Measuring layers", 0, len(probed))
    for one, kl in zip(rounded, divergences(reference, ((trunk, one) for one in rounded), probes), strict=True):
        measured.append(kl / (one.squares / one.tokens))
        progress("Measuring layers", len(measured), len(probed))
    gains = np.exp(np.interp(range(layers), probed, np.log(np.maximum(measured, 1e-30))))
    return Calibrated(inputs, gains.tolist())


def probes_of(texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The part of the text on which gains are measured."""
    return [text[:_PROBE_TOKENS] for text in texts[: max(1, _PROBE_TOKENS // max(1, len(texts[0])))]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What each projection of each expert would cost in each format."""

    manifest: Manifest
    owners: list[tuple[ExpertId, str]]  # whose projection it is, and its name in `ExpertSpec.tensors`
    formats: list[list[Format]]  # its own, then those of CANDIDATES
    options: list[list[Option]]  # the same as bytes and damage


def measure(manifest: Manifest, read: Read, calibrated: Calibrated, progress: Progress) -> Measured:
    """Quantizes some rows of every projection in every format."""
    measured = Measured(manifest, [], [], [])
    total = sum(layer.experts for layer in manifest.layers)
    for number, layer in enumerate(manifest.layers):
        for expert in range(layer.experts):
            progress("Measuring formats", len(measured.owners) // 2, total)
            spec, name = layer.spec_of(expert), ExpertId(number, expert)
            for projection in projections(spec, read(name), calibrated.inputs[number], expert):
                own = spec.format if projection.name == "up" else spec.back_format
                formats = [own, *(fmt for fmt in CANDIDATES if fmt != own)]
                damages = [0.0, *_damages(projection, formats[1:])]
                measured.owners.append((name, projection.name))
                measured.formats.append(formats)
                measured.options.append(
                    [
                        Option(_nbytes(spec, projection.name, fmt), calibrated.gains[number] * damage)
                        for fmt, damage in zip(formats, damages, strict=True)
                    ]
                )
    return measured


def plan(measured: Measured, budget: int, trunk: Sequence[TrunkPart] = ()) -> Precision | None:
    """The formats for `budget` bytes of experts and parts of the trunk; None if even the smallest are more."""
    chosen = choose([*measured.options, *(part.options for part in trunk)], budget)
    if chosen is None:
        return None
    picks = chosen.picks[: len(measured.options)]
    other = {
        part.name: part.formats[pick]
        for part, pick in zip(trunk, chosen.picks[len(measured.options) :], strict=True)
        if pick > 0
    }
    picked: dict[ExpertId, dict[str, Format]] = {}
    for (name, projection), formats, pick in zip(measured.owners, measured.formats, picks, strict=True):
        picked.setdefault(name, {})[projection] = formats[pick]
    layers = tuple(
        replace(
            layer,
            formats=tuple(
                (picked[ExpertId(number, e)]["up"], picked[ExpertId(number, e)]["down"]) for e in range(layer.experts)
            ),
        )
        for number, layer in enumerate(measured.manifest.layers)
    )
    return Precision(layers, sum(layer.nbytes for layer in layers), chosen.damage, chosen.bound, other)


def _damages(projection: Projection, formats: Sequence[Format]) -> list[float]:
    rows = slice(0, None, max(1, len(projection.weight) // _ROWS))
    sampled = projection.weight[rows]
    moments = Moments.of(projection.moments)
    found = []
    for fmt in formats:
        stored = quantize(fmt, sampled, moments)
        numbers = torch.from_numpy(gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[fmt.upper()]))
        damage = projection.damage(numbers[:, : sampled.shape[1]], rows)
        found.append(damage * len(projection.weight) / len(sampled))
    return found


def smallest(spec: ExpertSpec) -> int:
    """Bytes of an expert's projections in the smallest of the formats that may be chosen."""
    return sum(
        min(place.nbytes, *(_nbytes(spec, place.name, fmt) for fmt in CANDIDATES))
        for place in spec.tensors
        if place.name in ("up", "down")
    )


def _nbytes(spec: ExpertSpec, projection: str, fmt: Format) -> int:
    """Bytes of one projection if the expert were in `fmt`."""
    return next(p.nbytes for p in replace(spec, format=fmt, down_format=None).tensors if p.name == projection)


class _Rounded:
    """An ExpertBackend in which one layer's experts are rounded; it sums up the squares of what that changes."""

    def __init__(self, exact: Experts, layer: int) -> None:
        self._exact = exact
        self._layer = layer
        manifest = exact.manifest
        old = manifest.layers[layer]
        new = replace(old, spec=replace(old.spec, format=PROBE, down_format=None), formats=())

        def read(expert: ExpertId) -> torch.Tensor:
            return encode(old.spec_of(expert.expert), exact.read(expert), new.spec, None)

        layers = (*manifest.layers[:layer], new, *manifest.layers[layer + 1 :])
        self._rounded = Experts(replace(manifest, layers=layers), read, exact.ops, 0)
        self.squares = 0.0
        self.tokens = 0

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        """See ExpertBackend.submit."""
        exact = self._exact.compute(layer, hidden, ids, weights)
        if layer != self._layer:
            return Ready(exact)
        other = self._rounded.compute(layer, hidden, ids, weights)
        self._rounded.forget()
        self.squares += float((other.float() - exact.float()).square().sum())
        self.tokens += len(hidden)
        return Ready(other)
