"""One layer's experts for some tokens, and what they cost.

The order of every sum is that of the request's pairs (kernels/ops.py), so the same request gives the same bits, from
whichever tier its experts come.
"""

import itertools
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np
import torch

from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction
from moehive.proto.tensors import Routing

from .store import ExpertStore
from .tiers.parts import part_of
from .tiers.ram import RamTier
from .types import GpuFailed, NodeError

if TYPE_CHECKING:
    from .tiers.gpu import GpuTier  # imports Triton, which only a node with a GPU needs

# A request of more tokens, a piece of a prompt, is no guide to the next layer's experts: it wants nearly all of them.
FORESEEN_TOKENS = 8
# Multiply-adds above which a request goes to the worker's thread. 100 million read 200 MB of bf16 at one token,
# some 10 ms on a home machine; a thread's hand-over is about 0.1 ms.
LARGE_WORK = 100_000_000


class CannotCompute(NodeError):
    """The request does not fit the model that this node holds."""


@dataclass(slots=True)
class Totals:
    """Work since start: requests answered, (request, expert) pairs computed, own time in nanoseconds."""

    calls: int = 0
    expert_calls: int = 0
    compute_ns: int = 0


class Executor:
    """Computes requests; any thread may call it."""

    def __init__(self, store: ExpertStore, ops: ExpertOps) -> None:
        self.store = store
        self.ops = ops
        self.totals = Totals()
        self._lock = threading.Lock()

    def compute(
        self,
        layer: int,
        hidden: torch.Tensor,
        routing: Routing,
        reduction: Reduction,
        likely: Sequence[Sequence[int]] | None = (),
        in_place: bool = False,
    ) -> tuple[torch.Tensor, int]:
        """The rows for `hidden` [tokens, hidden] f32 or bf16, in its dtype, and the time taken in nanoseconds.

        Rows are [tokens, hidden], or [pairs, hidden] with Reduction.PER_EXPERT. `likely`: experts that the next layer
        may ask for, the one after it, and so on, each likeliest first; None: nothing is read ahead. Waits for experts
        on disk. `in_place`: sums may take the memory of `hidden`, which nobody needs any more. Raises
        KeyError(expert) when this node does not hold an expert, CannotCompute when the model has no such layer or
        another hidden size, DiskReadError.
        """
        start = perf_counter_ns()
        spec = self.store.spec(layer)
        if spec is None or spec.hidden_size != hidden.shape[1]:
            raise CannotCompute(
                f"This node's model has no experts of hidden size {hidden.shape[1]} in layer {layer}: the "
                "coordinator serves another model than it assigned."
            )
        tier = self.store.tier
        gpu = self.store.gpu
        if gpu is not None and not gpu.idle:
            with gpu.lock:
                while True:
                    try:
                        rows = self._beside_gpu(gpu, layer, spec, hidden, routing, reduction, likely)
                        break
                    except GpuFailed:  # it holds fewer experts now, in the end none
                        continue
        elif tier is None:
            held = self.store.layer(layer)
            rows = self.ops.moe_layer(
                spec, held, hidden, routing.offsets, routing.experts, routing.weights, reduction, in_place
            )
        else:
            rows = self._above_disk(tier, layer, spec, hidden, routing, reduction, likely, in_place)
        elapsed = perf_counter_ns() - start
        self.note(len(routing.experts), elapsed)
        return rows, elapsed

    def note(self, pairs: int, elapsed: int, calls: int = 1) -> None:
        """Requests of so many pairs together were computed within `elapsed` nanoseconds."""
        with self._lock:
            self.totals.calls += calls
            self.totals.expert_calls += pairs
            self.totals.compute_ns += elapsed

    def quick(self, layer: int, pairs: int) -> bool:
        """Whether so many pairs of a layer are computed sooner than a thread's hand-over is worth."""
        spec = self.store.spec(layer)
        return spec is None or pairs * spec.weights <= LARGE_WORK

    def in_memory(self, layer: int, routing: Routing) -> bool:
        """Whether none of a request's experts has to be read from disk first, as things stand."""
        tier = self.store.tier
        if tier is None or self.store.spec(layer) is None:
            return True
        wanted = set(routing.experts.tolist()) - self.store.layer(layer).keys() - self._on_gpu(layer)
        return tier.resident(layer).issuperset(wanted)

    def on_disk(self, layer: int) -> set[int] | None:
        """The experts of a layer that would have to be read first; None: this node keeps none on disk."""
        tier = self.store.tier
        return None if tier is None else tier.on_disk(layer) - self._on_gpu(layer)

    def _on_gpu(self, layer: int) -> frozenset[int]:
        """The experts of a layer that lie on a GPU, at a glance: another thread may change that."""
        return frozenset() if self.store.gpu is None else frozenset(self.store.gpu.layer(layer))

    def _above_disk(
        self,
        tier: RamTier,
        layer: int,
        spec: ExpertSpec,
        hidden: torch.Tensor,
        routing: Routing,
        reduction: Reduction,
        likely: Sequence[Sequence[int]] | None,
        in_place: bool,
    ) -> torch.Tensor:
        """Computes the experts that are in RAM while the others are read, and those as they come."""
        numbers = set(routing.experts.tolist())
        staying = self.store.layer(layer)
        lease = tier.lease(layer, numbers - staying.keys())
        try:
            if likely is not None and len(hidden) <= FORESEEN_TOKENS:
                tier.prefetch(layer, likely, len(hidden) * self.store.top_k(layer))
            if lease.whole:
                held = {**staying, **next(lease, {})}
                return self.ops.moe_layer(
                    spec, held, hidden, routing.offsets, routing.experts, routing.weights, reduction, in_place
                )
            groups = itertools.chain([staying], lease) if staying else lease
            pairs = self._in_groups(groups, layer, spec, hidden, routing)
            return self._reduce(pairs, hidden, routing, reduction)
        finally:
            lease.close()

    def _beside_gpu(
        self,
        gpu: "GpuTier",
        layer: int,
        spec: ExpertSpec,
        hidden: torch.Tensor,
        routing: Routing,
        reduction: Reduction,
        likely: Sequence[Sequence[int]] | None,
    ) -> torch.Tensor:
        """What the GPU holds is computed there, the rest wherever it is cheaper (tiers/gpu.py)."""
        tier, staying = self.store.tier, self.store.layer(layer)
        if tier is None:
            pairs = gpu.compute(layer, spec, staying, hidden, routing)
            return self._reduce(pairs, hidden, routing, reduction)
        numbers = set(routing.experts.tolist())
        there = gpu.layer(layer).keys()
        lease = tier.lease(layer, numbers - staying.keys() - there)
        try:
            if likely is not None and len(hidden) <= FORESEEN_TOKENS:
                tier.prefetch(layer, likely, len(hidden) * self.store.top_k(layer), self._on_gpu)
            groups = itertools.chain([staying], lease)
            pairs = self._in_groups(groups, layer, spec, hidden, routing, gpu, frozenset(there))
            return self._reduce(pairs, hidden, routing, reduction)
        finally:
            lease.close()

    def _in_groups(
        self,
        groups: Iterable[Mapping[int, ExpertWeights]],
        layer: int,
        spec: ExpertSpec,
        hidden: torch.Tensor,
        routing: Routing,
        gpu: "GpuTier | None" = None,
        on_gpu: Collection[int] = (),
    ) -> torch.Tensor:
        """All pairs in f32 [pairs, hidden], group by group of the experts in RAM; `on_gpu` go with the first."""
        x = hidden.float().contiguous()
        pairs = torch.empty(len(routing.experts), spec.hidden_size)
        for held in groups:
            if gpu is None:
                self.ops.write_pairs(held, x, routing.offsets, routing.experts, routing.weights, pairs)
                continue
            mine = np.isin(routing.experts, [*held, *on_gpu])
            on_gpu = ()
            pairs[torch.from_numpy(mine)] = gpu.compute(layer, spec, held, x, part_of(routing, mine))
        return pairs

    def _reduce(
        self, pairs: torch.Tensor, hidden: torch.Tensor, routing: Routing, reduction: Reduction
    ) -> torch.Tensor:
        if reduction is Reduction.PER_EXPERT:
            return pairs.to(hidden.dtype)
        return self.ops.sum_pairs(pairs, routing.offsets).to(hidden.dtype)
