"""Divergence of a model at a budget of bytes, beside the best uniform format: `moehive bench budget` runs this."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from moehive.kernels.geometry import ExpertId, Format, Manifest
from moehive.kernels.ops import ExpertOps

from ..app import text_of
from ..checkpoints.opening import ModelSource, open_model
from ..precision.candidates import CANDIDATES, Progress
from ..precision.encode import encode
from ..precision.forward import Experts, Read, divergence, log_probabilities
from ..precision.plan import Calibrated, calibrate, measure, plan
from ..precision.text import calibration_texts
from ..trunk import load_trunk
from .trained_like import CONFIGS, save_trained_like, texts

BITS: Final = (3.0, 3.5, 4.5)  # a weight
_MEMORY = 4 << 30  # bytes of experts that are kept from one pass to the next
_PIECE = 256  # tokens of one text
_TRAINED_LIKE = 3072, 768  # tokens to calibrate a trained-like model with, and to measure it on


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """One budget: `bits` a weight of the experts; divergences in nats a token on text that nothing was fitted to."""

    model: str
    bits: float
    uniform_format: str  # the one with least divergence among those that fit
    uniform_bits: float
    uniform_kl: float
    chosen_bits: float
    chosen_kl: float
    ratio: float  # chosen_kl by uniform_kl
    expected_kl: float  # what the choice was made by
    gap: float  # how far, at most, the choice is from the best by that measure, as a share


def measure_budgets(model: str | None, folder: Path, threads: int, progress: Progress) -> list[BudgetRow]:
    """Of `model` (a path or a hub id), or of the trained-like models, which are made in `folder`.

    Raises CoordinatorError for a model that can't be read.
    """
    rows: list[BudgetRow] = []
    for name, config in {} if model is not None else CONFIGS.items():
        path = folder / name
        if not (path / "config.json").exists():
            save_trained_like(config, path)
        rows += _measure(open_model(str(path)), texts(_TRAINED_LIKE), threads, progress)
    if model is not None:
        source = open_model(model)
        rows += _measure(source, asyncio.run(_texts(source)), threads, progress)
    return rows


def _measure(
    source: ModelSource,
    text: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    threads: int,
    progress: Progress,
) -> list[BudgetRow]:
    """`text`: to calibrate with, and to measure on; int64 [T] each."""
    manifest, read, trunk, budgets = source.manifest, source.expert_blob, load_trunk(source, threads), BITS
    ops = ExpertOps(threads)
    exact = Experts(manifest, read, ops, _MEMORY)
    reference = log_probabilities(trunk, exact, text[1])

    def kl(changed: Manifest, other: Read) -> float:
        return divergence(reference, log_probabilities(trunk, Experts(changed, other, ops, 0), text[1]))

    weights = sum(layer.experts * layer.spec.weights for layer in manifest.layers)
    uniform: list[tuple[float, Format, float]] = []  # divergence, format, bits
    for done, fmt in enumerate(CANDIDATES):
        progress("Uniform formats", done, len(CANDIDATES))
        changed = _uniform(manifest, fmt)
        bits = changed.total_bytes * 8 / weights
        if bits <= max(budgets):
            uniform.append((kl(changed, _reader(manifest, changed, read, None)), fmt, bits))
    calibrated = calibrate(trunk, exact, text[0], progress)
    measured = measure(manifest, read, calibrated, progress)
    rows = []
    for budget in budgets:
        fitting = [one for one in uniform if one[2] <= budget]
        chosen = plan(measured, int(budget * weights / 8))
        if not fitting or chosen is None:
            continue  # not even the smallest format is so small
        changed = replace(manifest, layers=chosen.layers)
        progress("Quantizing", 0, 1)
        best, own = min(fitting), kl(changed, _reader(manifest, changed, read, calibrated))
        rows.append(
            BudgetRow(
                model=manifest.name,
                bits=budget,
                uniform_format=best[1],
                uniform_bits=best[2],
                uniform_kl=best[0],
                chosen_bits=chosen.nbytes * 8 / weights,
                chosen_kl=own,
                ratio=own / best[0],
                expected_kl=chosen.damage,
                gap=1 - chosen.bound / chosen.damage,
            )
        )
    return rows


def _uniform(manifest: Manifest, fmt: Format) -> Manifest:
    layers = tuple(
        replace(layer, spec=replace(layer.spec, format=fmt, down_format=None), formats=())
        for layer in manifest.layers
    )
    return replace(manifest, layers=layers)


def _reader(manifest: Manifest, changed: Manifest, read: Read, calibrated: Calibrated | None) -> Read:
    def reader(expert: ExpertId) -> torch.Tensor:
        old, new = (which.layers[expert.layer].spec_of(expert.expert) for which in (manifest, changed))
        known = None if calibrated is None else (calibrated.inputs[expert.layer], expert.expert)
        return encode(old, read(expert), new, known)

    return reader


async def _texts(source: ModelSource) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The calibration text, one piece in four held back."""
    tokens = torch.cat(await calibration_texts(text_of(source), None))
    pieces = list(tokens.split(_PIECE))
    held_back = pieces[3::4]
    return [piece for number, piece in enumerate(pieces) if number % 4 != 3], held_back
