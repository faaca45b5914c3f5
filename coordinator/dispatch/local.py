"""Experts in the coordinator's own spare memory: a node without a hop, straight to the kernels."""

from collections.abc import Callable, Iterable
from time import perf_counter_ns

import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction, load_expert
from moehive.proto.tensors import Routing


class LocalExperts:
    """Holds some experts in RAM and computes them on the caller's thread."""

    def __init__(self, manifest: Manifest, threads: int) -> None:
        self._manifest = manifest
        self._ops = ExpertOps(threads)
        self._held: list[dict[int, ExpertWeights]] = [{} for _ in manifest.layers]
        self.expert_calls = 0
        self.compute_ns = 0

    def hold(self, experts: Iterable[ExpertId], read: Callable[[ExpertId], torch.Tensor]) -> None:
        """Loads `experts` through `read` (an expert's blob), keeping those already held."""
        for expert in experts:
            held = self._held[expert.layer]
            if expert.expert not in held:
                held[expert.expert] = load_expert(
                    self._manifest.layers[expert.layer].spec_of(expert.expert), read(expert)
                )

    def drop_except(self, experts: frozenset[ExpertId]) -> None:
        """Frees what is not among `experts`."""
        for layer, held in enumerate(self._held):
            for number in [n for n in tuple(held) if ExpertId(layer, n) not in experts]:  # `hold` may be adding
                del held[number]

    def __contains__(self, expert: ExpertId) -> bool:
        return expert.expert in self._held[expert.layer]

    @property
    def count(self) -> int:
        """Experts held."""
        return sum(len(held) for held in self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of the experts held."""
        return sum(len(weights.blob) for held in self._held for weights in held.values())

    def compute(self, layer: int, hidden: torch.Tensor, routing: Routing, reduction: Reduction) -> torch.Tensor:
        """As a node would: `hidden` [tokens, hidden] on the CPU to rows of the same dtype."""
        start = perf_counter_ns()
        spec = self._manifest.layers[layer].spec
        values = self._ops.moe_layer(
            spec, self._held[layer], hidden, routing.offsets, routing.experts, routing.weights, reduction
        )
        self.compute_ns += perf_counter_ns() - start
        self.expert_calls += len(routing.experts)
        return values
