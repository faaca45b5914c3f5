"""Divergence of a model at a budget of bytes, beside the best uniform format: `moehive bench budget` runs this."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import torch

from moehive.kernels.geometry import ExpertId, Format, LayerGeometry, Manifest
from moehive.kernels.ops import ExpertOps

from ..checkpoints.opening import ModelSource, open_model
from ..cli.budget import trunk_matrices
from ..models.base import Trunk
from ..precision.candidates import CANDIDATES, Progress
from ..precision.encode import encode
from ..precision.forward import Experts, Read, divergence, greedy, log_probabilities
from ..precision.plan import Calibrated, Precision, calibrate, measure, plan, probes_of
from ..precision.text import calibration_texts
from ..precision.trunk_parts import TrunkMatrices, TrunkPart
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
        rows += _measure(source, asyncio.run(_sample(Text(*source.tokenizer()))), folder, threads, progress)
    return rows


class _Judge:
    """Runs a model with other experts: how far its answers are from its own, and what it says."""

    def __init__(self, source: ModelSource, trunk: Trunk, exact: Experts, sample: _Sample) -> None:
        self._trunk = trunk
        self._ops = exact.ops
        self._sample = sample
        self._text = Text(*source.tokenizer())
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
        comparison = _Comparison(source, sample, Path(calibration), threads, progress)
        rows, budgets = [], comparison.budgets()
        for done, budget in enumerate(budgets):
            progress("Quantizing", done, len(budgets))
            rows.append(comparison.experts(budget))
        whole = comparison.whole(trunk_matrices(source, threads))
    return rows if whole is None else [*rows, whole]


class _Uniform(NamedTuple):
    """One format for all experts; they compare by their divergence."""

    kl: float
    text: str
    format: Format
    bits: float


class _Comparison:
    """One model with formats that are chosen for a budget, and with the best uniform one."""

    def __init__(self, source: ModelSource, sample: _Sample, folder: Path, threads: int, progress: Progress) -> None:
        """Measures the uniform formats, and what rounding does to each expert; `folder` holds the experts' inputs."""
        trunk = load_trunk(source, threads)
        self._manifest, self._read = source.manifest, source.expert_blob
        self._sample, self._progress = sample, progress
        self._exact = Experts(self._manifest, self._read, ExpertOps(threads), _MEMORY)
        self._judge = _Judge(source, trunk, self._exact, sample)
        self._weights = sum(layer.experts * layer.spec.weights for layer in self._manifest.layers)
        self._uniform = self._measure_uniform()
        self._calibrated = calibrate(trunk, self._exact, sample.calibration, folder, progress)
        self._measured = measure(self._manifest, self._read, self._calibrated, progress)
        self._judged: dict[tuple[LayerGeometry, ...], tuple[float, str]] = {}  # with calibration

    def budgets(self) -> list[float]:
        """BITS, none less than the smallest uniform format takes."""
        least = min(one.bits for one in self._uniform)
        return sorted({max(bits, least) for bits in BITS})

    def experts(self, budget: float) -> BudgetRow:
        """Of the experts, in a budget of so many bits a weight; the trunk as it is."""
        best = min(one for one in self._uniform if one.bits <= budget)
        same, _ = self._with_calibration(_uniform(self._manifest, best.format).layers)
        chosen = plan(self._measured, round(budget * self._weights / 8))
        assert chosen is not None  # the smallest formats are those of the smallest uniform one
        own = self._with_calibration(chosen.layers)
        return self._row("experts", budget, best, same, chosen, chosen.nbytes * 8 / self._weights, own)

    def whole(self, matrices: TrunkMatrices | None) -> BudgetRow | None:
        """Of the experts and the trunk's `matrices` in WHOLE_BITS; None where there are none, or nothing fits."""
        fitting = [one for one in self._uniform if one.bits <= WHOLE_BITS]
        if matrices is None or not fitting:
            return None
        self._progress("Quantizing the trunk, too", 0, 1)
        calibration = self._sample.calibration
        parts = matrices.measure(self._exact, calibration, probes_of(calibration), self._progress)
        weights = self._weights + sum(part.rows * part.columns for part in parts)
        chosen = plan(self._measured, round(WHOLE_BITS * weights / 8), parts)
        if chosen is None:  # small matrices, whose rows few formats' blocks fit into
            return None
        fmt = min(fitting).format
        uniform = _uniform(self._manifest, fmt)
        other = {part.name: fmt for part in parts if fmt in part.formats}  # a block must fit into a row
        plain, text = self._rounded(uniform.layers, None, matrices.rounded(other, weighted=False))
        same, _ = self._rounded(uniform.layers, self._calibrated, matrices.rounded(other))
        own = self._rounded(chosen.layers, self._calibrated, matrices.rounded(chosen.trunk))
        best = _Uniform(plain, text, fmt, (uniform.total_bytes + _trunk_bytes(parts, other)) * 8 / weights)
        bits = (chosen.nbytes + _trunk_bytes(parts, chosen.trunk)) * 8 / weights
        return self._row("all", WHOLE_BITS, best, same, chosen, bits, own)

    def _measure_uniform(self) -> list[_Uniform]:
        found = []
        for done, fmt in enumerate(CANDIDATES):
            self._progress("Uniform formats", done, len(CANDIDATES))
            changed = _uniform(self._manifest, fmt)
            bits = changed.total_bytes * 8 / self._weights
            if bits <= max(BITS):
                found.append(_Uniform(*self._rounded(changed.layers, None), fmt, bits))
        return found

    def _with_calibration(self, layers: tuple[LayerGeometry, ...]) -> tuple[float, str]:
        if layers not in self._judged:
            self._judged[layers] = self._rounded(layers, self._calibrated)
        return self._judged[layers]

    def _rounded(
        self, layers: tuple[LayerGeometry, ...], calibrated: Calibrated | None, trunk: Trunk | None = None
    ) -> tuple[float, str]:
        """What the judge says of experts in the formats of `layers`, beside `trunk` or the model's own."""
        changed = replace(self._manifest, layers=layers)
        return self._judge.of(changed, _reader(self._manifest, changed, self._read, calibrated), trunk)

    def _row(
        self,
        rounded: str,
        budget: float,
        uniform: _Uniform,
        calibrated_kl: float,
        chosen: Precision,
        bits: float,
        judged: tuple[float, str],
    ) -> BudgetRow:
        kl, text = judged
        return BudgetRow(
            model=self._manifest.name,
            rounded=rounded,
            bits=budget,
            uniform_format=uniform.format,
            uniform_bits=uniform.bits,
            uniform_kl=uniform.kl,
            calibrated_kl=calibrated_kl,
            chosen_bits=bits,
            chosen_kl=kl,
            ratio=kl / uniform.kl,
            calibrated_ratio=kl / calibrated_kl,
            expected_kl=chosen.damage,
            gap=chosen.gap,
            exact_text=self._judge.exact_text,
            uniform_text=uniform.text,
            chosen_text=text,
        )


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
