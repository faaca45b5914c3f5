"""`moehive bench trunk`: what one layer of a trunk costs for one token, its experts answering at once.

Two questions. Layers 64 wide read nothing worth mentioning: what is left is overhead. Layers of real sizes should
take as long as memory takes to give their weights. The lean trunk and transformers' eager layer (the generic trunk)
have the same random weights and take turns, and between them the same threads read plain memory. One case has many
tokens in the cache, where attention reads as much as the weights are.
"""

import statistics
from collections.abc import Awaitable, Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moehive.kernels.linear import LinearOps
from moehive.kernels.trunk_ops import TrunkOps

from ..models.base import SequenceInput, Trunk, without_waiting
from ..models.generic import GenericTrunk
from ..models.lean import families
from ..models.lean.batch import Ops
from .timing import read_seconds, seconds_of, torch_threads
from .trunk_bytes import cache_bytes_of
from .trunk_cases import PROMPT, SMALL, Case, cases
from .trunk_model import ModelTensors, experts_of, random_model

_READ_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkRow:
    """One layer, the mean over a trunk's layers, with `context` tokens in the cache. Times in microseconds, bytes of
    weights, recurrent state and cache that a layer reads for a token.

    `bandwidth` and `read_bandwidth` are bytes a second, of the layer and of a plain read in the same run; `ratio` is
    the first by the second, and means something where the layer does not fit into caches. `eager_us` is of the same
    weights in bf16, or f32 where `format` is f32. `threads` of the CPU, or 0: a GPU (trunk_gpu.py).
    """

    family: str
    shape: str
    format: str
    context: int
    threads: int
    layer_us: float
    eager_us: float
    bytes: int
    bandwidth: float
    read_bandwidth: float
    ratio: float


def measure_trunk(quick: bool, threads: int) -> list[dict[str, Any]]:
    """All shapes, real sizes with `threads`, small ones with one; `quick`: fewer families, formats, repetitions.

    Raises NativeLibraryError without the native library.
    """
    rows: list[TrunkRow] = []
    with torch.no_grad():
        for case in cases(quick):
            count = 1 if case.config is SMALL else threads
            with torch_threads(count):
                rows += _measure(case, count, repeats=3 if quick else 9)
    return [asdict(row) for row in rows]


def _measure(case: Case, threads: int, repeats: int) -> Iterator[TrunkRow]:
    ops = Ops(LinearOps(threads), TrunkOps(threads))
    model = random_model(case)
    layers = model.config.num_hidden_layers
    eager = GenericTrunk(model, experts_of(model), case.family, 4096)
    eager_step = Decode(eager, case.prompt)
    memory = torch.ones(_READ_BYTES, dtype=torch.uint8)
    for fmt in case.formats:
        tensors = ModelTensors(model, fmt)
        lean = families.build(model.config, tensors, ops)
        lean_step = Decode(lean, case.prompt)
        times: list[list[float]] = [[], [], []]
        for _ in range(repeats):
            for series, step, tokens in (
                (times[0], lean_step, case.tokens),
                (times[1], eager_step, case.eager_tokens),
            ):
                step.token()  # wakes the threads: a decode's tokens come one after the other
                series.append(seconds_of(step.token, tokens))
            times[2].append(read_seconds(memory, threads))
        lean_s, eager_s, read_s = (statistics.median(series) for series in times)
        layer_s = lean_s / case.tokens / layers
        nbytes = (tensors.layer_bytes + lean_step.cache_bytes) // layers
        read_bandwidth = _READ_BYTES / read_s
        yield TrunkRow(
            family=case.family,
            shape=case.shape,
            format=fmt,
            context=case.prompt,
            threads=threads,
            layer_us=layer_s * 1e6,
            eager_us=eager_s / case.eager_tokens / layers * 1e6,
            bytes=nbytes,
            bandwidth=nbytes / layer_s,
            read_bandwidth=read_bandwidth,
            ratio=nbytes / layer_s / read_bandwidth,
        )


class _Ready:
    """An answer that is there when it is awaited."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value

    def __await__(self) -> Generator[None, None, torch.Tensor]:
        yield from ()  # never waits
        return self._value


class _InstantExperts:
    """An ExpertBackend that adds nothing, at once."""

    def __init__(self) -> None:
        self._zeros: dict[tuple[torch.Size, torch.dtype], _Ready] = {}

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        key = hidden.shape, hidden.dtype
        if key not in self._zeros:
            self._zeros[key] = _Ready(torch.zeros_like(hidden))
        return self._zeros[key]


class Decode:
    """One sequence that grows by a token with each call."""

    def __init__(self, trunk: Trunk, prompt: int = PROMPT) -> None:
        self._trunk = trunk
        self._experts = _InstantExperts()
        self._cache = trunk.new_cache()
        self._run(torch.arange(prompt) % trunk.vocab_size)
        self.token()

    def token(self) -> torch.Tensor:
        """The next token's logits, f32 [vocab]."""
        return self._run(torch.tensor([3]))

    @property
    def cache_bytes(self) -> int:
        """Of the sequence, which a token reads; of a lean trunk's."""
        return cache_bytes_of(self._cache)

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        return without_waiting(self._trunk.forward([SequenceInput(tokens, self._cache)], self._experts))[0]
