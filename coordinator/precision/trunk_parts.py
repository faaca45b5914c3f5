"""The trunk's matrices as parts of the choice: what each would cost in each format, at the model's output.

A matrix of each kind (`self_attn.q_proj`, `lm_head`) is rounded in a few layers, and the divergence at the output is
measured, as for a layer's experts (plan.py); between those layers the gain is interpolated. A format's damage is

    gain * mean square by which the matrix's output changes

where the latter is judged by the mean squares of its inputs alone, as in llama.cpp's importance matrix: second
moments of all of a trunk's inputs would take more memory than the trunk. Kernels of block formats round their inputs,
too, which is added; a few bits above the smallest formats it is what counts. A table of tokens' vectors is judged by
the tokens of the text.

Routers and their like, norms, biases and what is quantized already keep their bits.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import gguf
import numpy as np
import torch

from moehive.kernels.formats.file_rows import pack_file_rows
from moehive.kernels.geometry import Format, tensor_bytes
from moehive.kernels.linear import LinearOps, LinearWeights
from moehive.kernels.quantizers.feedback import Moments, quantize
from moehive.kernels.trunk_ops import TrunkOps

from ..models.base import ExpertBackend, Trunk
from ..models.lean import families
from ..models.lean.batch import Ops
from ..models.tensors import Embedding, Replaced, TensorSource, embedding_of
from .candidates import PROBE, Progress, without_padding
from .forward import divergences, log_probabilities, run_through
from .knapsack import Option

_KEPT: Final = re.compile(r"\.(gate|router|shared_expert_gate|in_proj_a|in_proj_b|in_proj_ba)\.weight$")
_PROBED_LAYERS: Final = 4  # of each kind
_WATCHED_TOKENS: Final = 2048  # of the text, for the sizes of inputs
_ROWS: Final = 64  # of a matrix, on which a format's error is measured
_TOKENS: Final = 256  # of a table, likewise
_STEP: Final = 1024  # rows that are quantized at once; a multiple of what formats lay side by side
_UNIT: Final = 32  # columns that share a factor when an input is rounded
_PAGE: Final = 4096  # bytes; a pack's matrices begin at multiples


class Inputs(NamedTuple):
    """What a matrix is multiplied with, f32 [columns] each."""

    squares: torch.Tensor  # their mean
    rounding: torch.Tensor  # the mean square of what 8 bits with a factor for each 32 columns change


@dataclass(frozen=True, slots=True, eq=False)
class TrunkPart:
    """A matrix [rows, columns]: `options` are its bytes and damage in each of `formats`; the first is its own."""

    name: str  # transformers' parameter name
    rows: int
    columns: int
    inputs: Inputs
    formats: tuple[Format, ...]
    options: tuple[Option, ...]


class TrunkMatrices:
    """A lean trunk whose matrices can be exchanged. Those in `plain` may get another format."""

    def __init__(self, config: Any, tensors: TensorSource, plain: frozenset[str], threads: int) -> None:
        """`config` has a lean trunk; `plain`: the matrices that `tensors` stores in f32, bf16 or f16.

        Raises CoordinatorError for missing tensors, NativeLibraryError.
        """
        self._config = config
        self._tensors = _Kept(tensors)
        self._linear = _Watched(threads)
        self._ops = Ops(self._linear, TrunkOps(threads))
        self.trunk: Trunk = families.build(config, self._tensors, self._ops)
        self._matrices = {
            name: weights
            for name, weights in self._tensors.matrices.items()
            if name in plain and not _KEPT.search(name) and without_padding(weights.columns)
        }

    @classmethod
    def of(cls, config: Any, tensors: TensorSource, plain: frozenset[str], threads: int) -> "TrunkMatrices | None":
        """None for a config that has no lean trunk: transformers' own model computes in plain formats only."""
        return None if families.unknown(config) else cls(config, tensors, plain, threads)

    @property
    def own_bytes(self) -> int:
        """Of all that may get another format, as they are stored."""
        return sum(_nbytes(weights, weights.format) for weights in self._matrices.values())

    @property
    def least_bytes(self) -> int:
        """Of the same in their smallest formats."""
        return sum(min(_nbytes(w, fmt) for fmt in _formats(w)) for w in self._matrices.values())

    def measure(
        self,
        experts: ExpertBackend,
        texts: Sequence[torch.Tensor],
        probes: Sequence[torch.Tensor],
        progress: Progress,
    ) -> list[TrunkPart]:
        """Runs `texts` (int64 [T] each) for the inputs' sizes, and `probes` once for each matrix that is rounded."""
        self._linear.watching = True
        watched = texts[: max(1, _WATCHED_TOKENS // len(texts[0]))]
        run_through(self.trunk, experts, watched, all_logits=True)  # since the last matrix is watched, too
        self._linear.watching = False
        reference = list(log_probabilities(self.trunk, experts, probes))
        kinds: dict[str, list[str]] = {}
        for name in self._matrices:
            kinds.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(name)
        probed = {kind: spread(len(names), _PROBED_LAYERS) for kind, names in kinds.items()}
        tried = [names[number] for kind, names in kinds.items() for number in probed[kind]]
        passes = ((self.rounded({name: _probe(self._matrices[name])}), experts) for name in tried)
        kl: dict[str, float] = {}
        progress("Measuring the trunk", 0, len(tried))
        for name, found in zip(tried, divergences(reference, passes, probes), strict=True):
            kl[name] = found
            progress("Measuring the trunk", len(kl), len(tried))
        parts = []
        for kind, names in kinds.items():
            samples = [self._sample(name, texts) for name in names]
            gains = [
                max(kl[names[number]], 1e-30)
                / max(samples[number].change(_probe(self._matrices[names[number]])), 1e-30)
                for number in probed[kind]
            ]
            every = np.exp(np.interp(range(len(names)), probed[kind], np.log(gains)))
            parts += [self._part(*each) for each in zip(names, samples, every.tolist(), strict=True)]
        return parts

    def _part(self, name: str, sample: "_Sample", gain: float) -> TrunkPart:
        weights = self._matrices[name]
        formats = _formats(weights)
        damages = [0.0, *(gain * sample.change(fmt) for fmt in formats[1:])]
        options = tuple(Option(_nbytes(weights, fmt), damage) for fmt, damage in zip(formats, damages, strict=True))
        return TrunkPart(name, weights.rows, weights.columns, sample.inputs, formats, options)

    def _sample(self, name: str, texts: Sequence[torch.Tensor]) -> "_Sample":
        weights = self._matrices[name]
        inputs = self._linear.inputs.get(weights)
        if inputs is not None:
            rows = torch.arange(0, weights.rows, max(1, weights.rows // _ROWS))
            counts = torch.full((len(rows),), weights.rows / len(rows))
        else:
            tokens, uses = torch.cat([*texts]).unique(return_counts=True)
            most = uses.argsort(descending=True)[:_TOKENS]
            rows, counts, inputs = tokens[most], uses[most] / uses.sum(), _looked_up(weights)
        return _Sample(weights.stored[rows].float(), counts, inputs)

    def rounded(self, formats: Mapping[str, Format], weighted: bool = True) -> Trunk:
        """The trunk with some matrices in other formats; it shares all others with this one.

        `weighted`: columns count by their inputs, once `measure` knows those.
        """
        changed = {}
        for name, fmt in formats.items():
            weights = self._matrices[name]
            inputs = (self._linear.inputs.get(weights) if weighted else None) or _looked_up(weights)
            blob = torch.cat(list(encode_matrix(weights, fmt, inputs.squares)))
            changed[name] = LinearWeights(fmt, weights.rows, weights.columns, blob)
        return families.build(self._config, Replaced(self._tensors, changed), self._ops)


def encode_matrix(weights: LinearWeights, format: Format, squares: torch.Tensor) -> Iterator[torch.Tensor]:
    """A plain matrix in `format` as kernels compute it, uint8, piece by piece.

    `squares`: the mean ones of its inputs, f32 [columns].
    """
    importance = Moments.diagonal(squares)
    for first in range(0, weights.rows, _STEP):
        numbers = weights.stored[first : first + _STEP]
        piece = torch.empty(tensor_bytes(format, *numbers.shape), dtype=torch.uint8)
        pack_file_rows(format, quantize(format, numbers, importance), weights.columns, piece)
        yield piece


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `count`, evenly, both ends among them."""
    return sorted({round(n * (count - 1) / max(1, min(count, most) - 1)) for n in range(min(count, most))})


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """Some rows of a matrix, f32 [n, columns], and how much each counts, f32 [n]."""

    numbers: torch.Tensor
    counts: torch.Tensor
    inputs: Inputs

    def change(self, format: Format) -> float:
        """Mean square by which the matrix's output changes in `format`."""
        stored = quantize(format, self.numbers, Moments.diagonal(self.inputs.squares))
        rounded = torch.from_numpy(gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[format.upper()]))
        each = (rounded - self.numbers).square() @ self.inputs.squares + rounded.square() @ self.inputs.rounding
        return float(each @ self.counts)


class _Kept:
    """A TensorSource that reads each matrix once and keeps it."""

    def __init__(self, source: TensorSource) -> None:
        self.matrices: dict[str, LinearWeights] = {}
        self._source = source

    @property
    def dtype(self) -> torch.dtype:
        """See TensorSource."""
        return self._source.dtype

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def linear(self, name: str) -> LinearWeights:
        """See TensorSource."""
        if name not in self.matrices:
            self.matrices[name] = self._source.linear(name)
        return self.matrices[name]

    def column_order(self, name: str) -> torch.Tensor | None:
        """See TensorSource."""
        return self._source.column_order(name)

    def tensor(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        return self._source.tensor(name)

    def embedding(self, name: str) -> Embedding:
        """See TensorSource."""
        return embedding_of(self.linear(name))


class _Watched(LinearOps):
    """Keeps what is known of each matrix's inputs, while `watching`."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.watching = False
        self.inputs: dict[LinearWeights, Inputs] = {}
        self._tokens: dict[LinearWeights, int] = {}

    def linear(self, weights: LinearWeights, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See LinearOps."""
        if self.watching:
            self._note(weights, x)
        return super().linear(weights, x, out)

    def linears(
        self, weights: Sequence[LinearWeights], x: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See LinearOps."""
        if not self.watching:
            return super().linears(weights, x, out)
        return torch.cat([self.linear(one, x) for one in weights], 1, out=out)

    def _note(self, weights: LinearWeights, x: torch.Tensor) -> None:
        columns = weights.columns
        self._tokens[weights] = self._tokens.get(weights, 0) + len(x)
        steps = torch.nn.functional.pad(x, (0, -columns % _UNIT)).view(len(x), -1, _UNIT).abs().amax(2) / 127
        rounding = (steps.square() / 12).repeat_interleave(_UNIT, 1)[:, :columns]
        known = self.inputs.setdefault(weights, Inputs(torch.zeros(columns), torch.zeros(columns)))
        for mean, new in zip(known, (x.square(), rounding), strict=True):
            mean += (new.mean(0) - mean) * (len(x) / self._tokens[weights])


def _looked_up(weights: LinearWeights) -> Inputs:
    """The inputs of a table, of which one row is taken for each token."""
    return Inputs(torch.ones(weights.columns), torch.zeros(weights.columns))


def _formats(weights: LinearWeights) -> tuple[Format, ...]:
    return (weights.format, *without_padding(weights.columns))


def _probe(weights: LinearWeights) -> Format:
    fitting = without_padding(weights.columns)
    return PROBE if PROBE in fitting else fitting[0]


def _nbytes(weights: LinearWeights, format: Format) -> int:
    """In a pack, in `format`; in its own it stays among the trunk's other tensors."""
    size = tensor_bytes(format, weights.rows, weights.columns)
    return size if format == weights.format else -(-size // _PAGE) * _PAGE
