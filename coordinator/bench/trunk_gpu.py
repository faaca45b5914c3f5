"""`moehive bench trunk` on a GPU: what a layer costs for one token, recorded as CUDA graphs.

The shapes and formats are those of trunk_cases.py. Layers 64 wide show what is left when nothing is read;
layers of real sizes, what part of the memory's bandwidth is reached. A token's time has everything in it that a real
one's has: what the experts are asked with is in main memory before they answer, and their sums go back. transformers'
eager layers, on the same GPU, take turns with it; their routed experts add nothing, as ours.
"""

import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from transformers import DynamicCache

from moehive.kernels.linear import LinearOps
from moehive.kernels.machine import cores
from moehive.kernels.trunk_ops import TrunkOps

from ..models.lean import families
from ..models.lean.batch import Ops
from ..models.lean.gpu.trunk import GpuTrunk
from .timing import device_seconds_of
from .trunk import Decode, TrunkRow
from .trunk_cases import Case, cases
from .trunk_model import ModelTensors, experts_of, random_model

_READ_BYTES = 1 << 30


def measure_gpu_trunk(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """All shapes in all formats that a GPU computes, with 0 threads. Raises NativeLibraryError, PlanesError."""
    with torch.no_grad():
        repeats = 3 if quick else 9
        rows = [row for case in cases(quick) for row in measure(case, device, repeats, _READ_BYTES)]
    return [asdict(row) for row in rows]


def measure(case: Case, device: torch.device, repeats: int, read_bytes: int) -> Iterator[TrunkRow]:
    """`device` is a GPU, or the CPU in the interpreter."""
    ops = Ops(LinearOps(cores()), TrunkOps(cores()))
    model = random_model(case)
    layers = model.config.num_hidden_layers
    eager = _Eager(random_model(case).to(device), case.prompt)
    memory = torch.ones(read_bytes // 4, device=device)
    for fmt in case.formats:
        tensors = ModelTensors(model, fmt)
        trunk = GpuTrunk(families.read(model.config, tensors, ops), ops, device)
        decode = Decode(trunk, case.prompt)
        for warm in (decode.token, eager.token, memory.sum):  # compiles, records
            warm()
        times: list[list[float]] = [[], [], []]
        for _ in range(repeats):
            times[0].append(device_seconds_of(decode.token, case.tokens, device) / case.tokens)
            times[1].append(device_seconds_of(eager.token, case.eager_tokens, device) / case.eager_tokens)
            times[2].append(device_seconds_of(memory.sum, 1, device))
        layer_s, eager_s, read_s = (statistics.median(series) for series in times)
        layer_s /= layers
        nbytes = (tensors.layer_bytes + decode.cache_bytes) // layers
        read_bandwidth = memory.nbytes / read_s
        yield TrunkRow(
            family=case.family,
            shape=case.shape,
            format=fmt,
            context=case.prompt,
            threads=0,
            layer_us=layer_s * 1e6,
            eager_us=eager_s / layers * 1e6,
            bytes=nbytes,
            bandwidth=nbytes / layer_s,
            read_bandwidth=read_bandwidth,
            ratio=nbytes / layer_s / read_bandwidth,
        )


class _Eager:
    """transformers' own model, one sequence that grows by a token with each call."""

    def __init__(self, model: Any, prompt: int) -> None:
        for module in experts_of(model):
            module.forward = _nothing
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._run(list(range(prompt)))

    def token(self) -> torch.Tensor:
        """The next token's logits."""
        return self._run([3])

    def _run(self, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self._model.device)
        logits: torch.Tensor = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits
        return logits


def _nothing(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    """What routed experts answer."""
    return torch.zeros_like(hidden)
