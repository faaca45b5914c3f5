"""MLP kinds: dense, and routed experts with or without a shared one."""

from typing import NamedTuple, Protocol

import torch

from moehive.kernels.geometry import Activation
from moehive.kernels.linear import LinearWeights
from moehive.kernels.trunk_ops import RouterLayer

from ... import timeline
from ..base import ExpertBackend, tiers_of
from .batch import Ops
from .foresight import likely, prefer_in_memory


class Addend(NamedTuple):
    """What is added to the residual stream: add + more * sigmoid(gate)."""

    add: torch.Tensor  # [T, hidden], f32 or bf16
    more: torch.Tensor | None = None  # f32 [T, hidden]
    gate: torch.Tensor | None = None  # f32 [T]; None: more as it is


class Mlp(Protocol):
    """One layer's MLP."""

    async def forward(self, x: torch.Tensor, sent: torch.Tensor, experts: ExpertBackend) -> Addend:
        """`x` f32 [T, hidden]; `sent` the same in the dtype that travels to the experts."""
        ...


class DenseMlp:
    """down(activation(gate(x)) * up(x)); also a shared expert."""

    def __init__(
        self, ops: Ops, gate: LinearWeights, up: LinearWeights, down: LinearWeights, activation: Activation
    ) -> None:
        self._ops = ops
        self._up = [gate, up]
        self._down = down
        self._activation: Activation = activation

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """f32 [T, hidden] → f32 [T, hidden]."""
        middle = torch.empty(len(x), self._down.columns)
        self._ops.trunk.gate(self._ops.linear.linears(self._up, x), self._activation, middle)
        return self._ops.linear.linear(self._down, middle)

    async def forward(self, x: torch.Tensor, sent: torch.Tensor, experts: ExpertBackend) -> Addend:
        """See Mlp."""
        with timeline.current.span("dense"):
            return Addend(self.compute(x))


class MoeMlp:
    """Routed experts, computed elsewhere; while they are, the shared expert here."""

    def __init__(
        self,
        ops: Ops,
        ordinal: int,
        router: RouterLayer,
        router_weights: LinearWeights,
        shared: DenseMlp | None = None,
        shared_gate: LinearWeights | None = None,
    ) -> None:
        """`ordinal`: of the MoE layer; `shared_gate` [1, hidden]: how much of the shared expert a token takes."""
        self._ops = ops
        self._ordinal = ordinal
        self._router = router  # keeps the bias alive that `_native` points to
        self._native = router.structure()
        self._router_weights = router_weights
        self._shared = shared
        self._shared_gate = shared_gate

    def foresee(self, x: torch.Tensor) -> list[int]:
        """Experts that this layer may ask for, likeliest first, judged by `x` f32 [T, hidden] of an earlier layer."""
        return likely(self._router, self._ops.linear.linear(self._router_weights, x))

    async def forward(self, x: torch.Tensor, sent: torch.Tensor, experts: ExpertBackend) -> Addend:
        """See Mlp."""
        linear = self._ops.linear
        shape = len(x), self._router.top_k
        ids, weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        with timeline.current.span("router"):
            logits = linear.linear(self._router_weights, x)
            self._ops.trunk.route(self._native, logits, ids, weights)
            tiers = tiers_of(experts)
            if tiers is not None and tiers.margin and (on_disk := tiers.on_disk(self._ordinal)) is not None:
                prefer_in_memory(self._router, logits, on_disk, tiers.margin, ids, weights)
        pending = experts.submit(self._ordinal, sent, ids, weights)
        more = gate = None
        if self._shared is not None:
            with timeline.current.span("shared expert"):
                more = self._shared.compute(x)
                if self._shared_gate is not None:
                    gate = linear.linear(self._shared_gate, x)[:, 0]
        return Addend(await pending, more, gate)
