"""MLP kinds: dense, and routed experts with or without a shared one."""

import os
from typing import NamedTuple, Protocol

import torch

from moehive.kernels.fused import FusedMlp, FusedRouter
from moehive.kernels.geometry import Activation
from moehive.kernels.linear import FEW_TOKENS, LinearWeights
from moehive.kernels.trunk_ops import RouterLayer

from ... import timeline
from ..base import ExpertBackend, Tiers, tiers_of
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
        self,
        ops: Ops,
        gate: LinearWeights,
        up: LinearWeights,
        down: LinearWeights,
        activation: Activation,
        share: LinearWeights | None = None,
    ) -> None:
        """`share` [1, hidden]: how much of a shared expert a token takes."""
        self._ops = ops
        self._share = share
        self._fused = FusedMlp(ops.trunk, gate, up, down, activation, share)
        self._up = [gate, up]
        self._down = down
        self._activation: Activation = activation

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """f32 [T, hidden] → f32 [T, hidden], and its share [T] before the sigmoid."""
        if len(x) <= FEW_TOKENS:
            return self._fused(x)
        linear = self._ops.linear
        middle = torch.empty(len(x), self._down.columns)
        self._ops.trunk.gate(linear.linears(self._up, x), self._activation, middle)
        out = linear.linear(self._down, middle)
        return out, None if self._share is None else linear.linear(self._share, x)[:, 0]

    async def forward(self, x: torch.Tensor, sent: torch.Tensor, experts: ExpertBackend) -> Addend:
        """See Mlp."""
        with timeline.current.span("dense"):
            return Addend(self.compute(x)[0])


class MoeMlp:
    """Routed experts, computed elsewhere; while they are, the shared expert here."""

    def __init__(
        self,
        ops: Ops,
        ordinal: int,
        router: RouterLayer,
        router_weights: LinearWeights,
        shared: DenseMlp | None = None,
    ) -> None:
        """`ordinal`: of the MoE layer."""
        self._ops = ops
        self._ordinal = ordinal
        self._router = router  # keeps the bias alive that `_native` points to
        self._native = router.structure()
        self._router_weights = router_weights
        self._shared = shared
        self._fused = FusedRouter(ops.trunk, router_weights, router)

    def foresee(self, x: torch.Tensor) -> list[int]:
        """Experts that this layer may ask for, likeliest first, judged by `x` f32 [T, hidden] of an earlier layer."""
        return likely(self._router, self._ops.linear.linear(self._router_weights, x))

    async def forward(self, x: torch.Tensor, sent: torch.Tensor, experts: ExpertBackend) -> Addend:
        """See Mlp."""
        with timeline.current.span("router"):
            ids, weights = self._route(x, tiers_of(experts))
        self._ops.trunk.rest()
        pending = experts.submit(self._ordinal, sent, ids, weights)
        more = gate = None
        if self._shared is not None:
            os.sched_yield()  # nodes on this machine that were just asked go first: the layer waits for them
            with timeline.current.span("shared expert"):
                more, gate = self._shared.compute(x)
            self._ops.trunk.rest()
        return Addend(await pending, more, gate)

    def _route(self, x: torch.Tensor, tiers: Tiers | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's experts int64 and their weights f32, both [T, top_k]."""
        shape = len(x), self._router.top_k
        ids, weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        margin = 0.0 if tiers is None else tiers.margin
        if len(x) <= FEW_TOKENS and not margin:
            self._fused(x, ids, weights)
            return ids, weights
        logits = self._ops.linear.linear(self._router_weights, x)
        self._ops.trunk.route(self._native, logits, ids, weights)
        if tiers is not None and margin and (on_disk := tiers.on_disk(self._ordinal)) is not None:
            prefer_in_memory(self._router, logits, on_disk, margin, ids, weights)
        return ids, weights
