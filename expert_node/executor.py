"""One layer's experts for some tokens, and what they cost.

The order of every sum is that of the request's pairs (kernels/ops.py), so the same request gives the same bits.
"""

import threading
from dataclasses import dataclass
from time import perf_counter_ns

import torch

from moehive.kernels.ops import ExpertOps, Reduction
from moehive.proto.tensors import Routing

from .store import ExpertStore
from .types import NodeError


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
        self.totals = Totals()
        self._ops = ops
        self._lock = threading.Lock()

    def compute(
        self, layer: int, hidden: torch.Tensor, routing: Routing, reduction: Reduction
    ) -> tuple[torch.Tensor, int]:
        """The rows for `hidden` [tokens, hidden] f32 or bf16, in its dtype, and the time taken in nanoseconds.

        Rows are [tokens, hidden], or [pairs, hidden] with Reduction.PER_EXPERT. Raises KeyError(expert) when this
        node does not hold an expert, CannotCompute when the model has no such layer or another hidden size.
        """
        start = perf_counter_ns()
        spec = self.store.spec(layer)
        if spec is None or spec.hidden_size != hidden.shape[1]:
            raise CannotCompute(
                f"This node's model has no experts of hidden size {hidden.shape[1]} in layer {layer}: the "
                "coordinator serves another model than it assigned."
            )
        held = self.store.layer(layer)
        rows = self._ops.moe_layer(spec, held, hidden, routing.offsets, routing.experts, routing.weights, reduction)
        elapsed = perf_counter_ns() - start
        with self._lock:
            self.totals.calls += 1
            self.totals.expert_calls += len(routing.experts)
            self.totals.compute_ns += elapsed
        return rows, elapsed

    def work(self, layer: int, pairs: int) -> int:
        """Multiply-adds of `pairs` in a layer, roughly; 0 for an unknown layer."""
        spec = self.store.spec(layer)
        return 0 if spec is None else pairs * spec.hidden_size * (spec.projected_size + spec.intermediate_size)
