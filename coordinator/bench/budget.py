"""Divergence of a model at a budget of bytes, beside the best uniform format: `moehive bench budget` runs this."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch

from moehive.kernels.geometry import ExpertId, Format, LayerGeometry, Manifest
from moehive.kernels.ops import ExpertOps

from ..app import text_of
from ..checkpoints.opening import ModelSource, open_model
from ..cli.budget import trunk_matrices
from ..models.base import Trunk
from ..precision.candidates import CANDIDATES, Progress
from ..precision.encode import encode
from ..precision.forward import Experts, Read, divergence, greedy, log_probabilities
from ..precision.plan import Calibrated, calibrate, measure, plan, probes_of
from ..precision.text import calibration_texts
from ..precision.trunk_parts import TrunkPart
from ..serving.text import Text
from ..trunk import load_trunk
from ..types import InvalidRequest
from .trained_like import CONFIGS, save_trained_like, texts

BITS: Final = (3.0, 3.5, 4.5)  # a weight of the experts, beside a trunk as it is
WHOLE_BITS: Final = 3.5  # a weight of the experts and of the trunk's matrices
_MEMORY = 4 << 30  # bytes of experts that are kept from one pass to the next
_PIECE = 256  # tokens of one text
_TRAINED_LIKE = 3072, 768  # tokens to calibrate a trained-like model with, and to measure it on
_QUESTION = "Explain in three sentences why the sky is blue."
_ANSWER = 64  # tokens


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """One budget: `bits` a weight of what is `rounded`; divergences, nats a token, on text nothing was fitted to.

    A budget in which no uniform format fits is that of the smallest one.
    """

    model: str
    rounded: str  # experts; or all: the matrices of the trunk as well
    bits: float
    uniform_format: str  # the one with least divergence among those that fit
    uniform_bits: float
    uniform_kl: float  # rounded as by who has seen no text
    calibrated_kl: float  # the same format, rounded with the statistics of the same text as the choice
    chosen_bits: float
    chosen_kl: float
    ratio: float  # chosen_kl by uniform_kl
    calibrated_ratio: float  # chosen_kl by calibrated_kl
    expected_kl: float  # what the choice was made by
    gap: float  # how far, at most, the choice is from the best by that measure, as a share
    exact_text: str  # the greedy answer to a question, of the model as it is; empty if it reads no text
    uniform_text: str
    chosen_text: str


@dataclass(frozen=True, slots=True)
class _Sample:
    """Token ids, int64 [T] each: texts to calibrate with and to measure on; a question, if the model reads text."""

    calibration: Sequence[torch.Tensor]
    held_back: Sequence[torch.Tensor]
    question: torch.Tensor | None = None


def measure_budgets(model: str | None, folder: Path, threads: int, progress: Progress) -> list[BudgetRow]:
    """Of `model` (a path or a hub id), or of the trained-like models, which are made in `folder`.

    Raises CoordinatorError for a model that can't be read.
    """
    rows: list[BudgetRow] = []
    for name, config in {} if model is not None else CONFIGS.items():
        path = folder / name
        if not (path / "config.json").exists():
            save_trained_like(config, path)
        rows += _measure(open_model(str(path)), _Sample(*texts(_TRAINED_LIKE)), folder, threads, progress)
    if model is not None:
        source = open_model(model)
        rows += _measure(source, asyncio.run(_sample(text_of(source))), folder, threads, progress)
    return rows


class _Judge:
    """Runs a model with other experts: how far its answers are from its own, and what it says."""

    def __init__(self, source: ModelSource, trunk: Trunk, exact: Experts, sample: _Sample) -> None:
        self._trunk = trunk
        self._ops = exact.ops
        self._sample = sample
        self._text = text_of(source)
        self._reference = list(log_probabilities(trunk, exact, sample.held_back))
        self.exact_text = self._answer(exact, trunk)

    def of(self, manifest: Manifest, read: Read, trunk: Trunk | None = None) -> tuple[float, str]:
        """The KL divergence, nats a token, and the answer to the question; `trunk`: in place of the model's own."""
        experts, trunk = Experts(manifest, read, self._ops, _MEMORY), trunk or self._trunk
        kl = divergence(self._reference, log_probabilities(trunk, experts, self._sample.held_back))
        return kl, self._answer(experts, trunk)

    def _answer(self, experts: Experts, trunk: Trunk) -> str:
        if self._sample.question is None:
            return ""
        stops = self._text.stop_tokens
        return self._text.decode(greedy(trunk, experts, self._sample.question, _ANSWER, stops))


def _measure(source: ModelSource, sample: _Sample, folder: Path, threads: int, progress: Progress) -> list[BudgetRow]:
    with TemporaryDirectory(prefix="calibration-", dir=folder) as calibration:
        return _rows(source, sample, Path(calibration), threads, progress)


def _rows(source: ModelSource, sample: _Sample, folder: Path, threads: int, progress: Progress) -> list[BudgetRow]:
    manifest, read, trunk = source.manifest, source.expert_blob, load_trunk(source, threads)
    exact = Experts(manifest, read, ExpertOps(threads), _MEMORY)
    judge = _Judge(source, trunk, exact, sample)
    weights = sum(layer.experts * layer.spec.weights for layer in manifest.layers)
    uniform: list[tuple[float, str, Format, float]] = []  # divergence, answer, format, bits
    for done, fmt in enumerate(CANDIDATES):
        progress("Uniform formats", done, len(CANDIDATES))
        changed = _uniform(manifest, fmt)
        bits = changed.total_bytes * 8 / weights
        if bits <= max(BITS):
            uniform.append((*judge.of(changed, _reader(manifest, changed, read, None)), fmt, bits))
    calibrated = calibrate(trunk, exact, sample.calibration, folder, progress)
    measured = measure(manifest, read, calibrated, progress)
    least = min(bits for *_, bits in uniform)
    budgets = sorted({max(bits, least) for bits in BITS})
    judged: dict[tuple[LayerGeometry, ...], tuple[float, str]] = {}  # with calibration

    def judge_calibrated(layers: tuple[LayerGeometry, ...]) -> tuple[float, str]:
        if layers not in judged:
            changed = replace(manifest, layers=layers)
            judged[layers] = judge.of(changed, _reader(manifest, changed, read, calibrated))
        return judged[layers]

    rows = []
    for done, budget in enumerate(budgets):
        progress("Quantizing", done, len(budgets))
        best = min(one for one in uniform if one[3] <= budget)
        same, _ = judge_calibrated(_uniform(manifest, best[2]).layers)
        chosen = plan(measured, round(budget * weights / 8))
        assert chosen is not None  # the smallest formats are those of the smallest uniform one
        own, answer = judge_calibrated(chosen.layers)
        rows.append(
            BudgetRow(
                model=manifest.name,
                rounded="experts",
                bits=budget,
                uniform_format=best[2],
                uniform_bits=best[3],
                uniform_kl=best[0],
                calibrated_kl=same,
                chosen_bits=chosen.nbytes * 8 / weights,
                chosen_kl=own,
                ratio=own / best[0],
                calibrated_ratio=own / same,
                expected_kl=chosen.damage,
                gap=chosen.gap,
                exact_text=judge.exact_text,
                uniform_text=best[1],
                chosen_text=answer,
            )
        )
    matrices = trunk_matrices(source, threads)
    fitting = [one for one in uniform if one[3] <= WHOLE_BITS]
    if matrices is None or not fitting:
        return rows

    progress("Quantizing the trunk, too", 0, 1)
    parts = matrices.measure(exact, sample.calibration, probes_of(sample.calibration), progress)
    weights += sum(part.rows * part.columns for part in parts)
    chosen = plan(measured, round(WHOLE_BITS * weights / 8), parts)
    if chosen is None:  # small matrices, whose rows few formats' blocks fit into
        return rows
    fmt = min(fitting)[2]
    changed = _uniform(manifest, fmt)
    other = {part.name: fmt for part in parts if fmt in part.formats}  # a block must fit into a row
    plain, text = judge.of(changed, _reader(manifest, changed, read, None), matrices.rounded(other, weighted=False))
    same, _ = judge.of(changed, _reader(manifest, changed, read, calibrated), matrices.rounded(other))
    mixed = replace(manifest, layers=chosen.layers)
    own, answer = judge.of(mixed, _reader(manifest, mixed, read, calibrated), matrices.rounded(chosen.trunk))
    rows.append(
        BudgetRow(
            model=manifest.name,
            rounded="all",
            bits=WHOLE_BITS,
            uniform_format=fmt,
            uniform_bits=(changed.total_bytes + _trunk_bytes(parts, other)) * 8 / weights,
            uniform_kl=plain,
            calibrated_kl=same,
            chosen_bits=(chosen.nbytes + _trunk_bytes(parts, chosen.trunk)) * 8 / weights,
            chosen_kl=own,
            ratio=own / plain,
            calibrated_ratio=own / same,
            expected_kl=chosen.damage,
            gap=chosen.gap,
            exact_text=judge.exact_text,
            uniform_text=text,
            chosen_text=answer,
        )
    )
    return rows


def _trunk_bytes(parts: Sequence[TrunkPart], formats: Mapping[str, Format]) -> int:
    """Of the trunk's matrices, those that `formats` does not name in their own."""
    return sum(part.options[part.formats.index(formats.get(part.name, part.formats[0]))].nbytes for part in parts)


def _uniform(manifest: Manifest, fmt: Format) -> Manifest:
    layers = tuple(replace(layer, formats=((fmt, fmt),) * layer.experts) for layer in manifest.layers)
    return replace(manifest, layers=layers)


def _reader(manifest: Manifest, changed: Manifest, read: Read, calibrated: Calibrated | None) -> Read:
    def reader(expert: ExpertId) -> torch.Tensor:
        old, new = (which.layers[expert.layer].spec_of(expert.expert) for which in (manifest, changed))
        known = None if calibrated is None else (calibrated.inputs[expert.layer], expert.expert)
        return encode(old, read(expert), new, known)

    return reader


async def _sample(words: Text) -> _Sample:
    """The calibration text, one piece in four held back."""
    tokens = torch.cat(await calibration_texts(words, None))
    pieces = list(tokens.split(_PIECE))
    try:
        question = await words.encode_chat([{"role": "user", "content": _QUESTION}])
    except InvalidRequest:  # no chat template
        question = await words.encode(_QUESTION)
    return _Sample(
        [piece for number, piece in enumerate(pieces) if number % 4 != 3], pieces[3::4], torch.tensor(question)
    )
