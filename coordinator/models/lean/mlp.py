"""MLP kinds: dense, and routed experts with or without a shared one."""

from typing import NamedTuple, Protocol

import torch

from moehive.kernels.layer import GatedMlp, Router

from ... import timeline
from ..base import ExpertBackend, tiers_of
from .batch import Ops
from .foresight import likely, spare_disks


class Addend(NamedTuple):
    """What is added to the residual stream: add + more * sigmoid(gate)."""

    add: torch.Tensor  # [T, hidden], f32 or bf16
    more: torch.Tensor | None = None  # f32 [T, hidden]
    gate: torch.Tensor | None = None  # f32 [T]; None: more as it is


class Mlp(Protocol):
    """One layer's MLP. `router` and `here` describe it for native calls with the rest of the layer."""

    @property
    def router(self) -> Router | None:
        """What chooses routed experts; None: it has none."""
        ...

    @property
    def here(self) -> GatedMlp | None:
        """What is computed in this process: all of it, or a shared expert."""
        ...

    async def forward(self, x: torch.Tensor, sent: torch.Tensor, experts: ExpertBackend) -> Addend:
        """`x` f32 [T, hidden]; `sent` the same in the dtype that travels to the experts."""
        ...


class DenseMlp:
    """An MLP without routed experts; also a shared expert."""

    router: Router | None = None

    def __init__(self, ops: Ops, mlp: GatedMlp) -> None:
        self._ops = ops
        self.here = mlp

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """f32 [T, hidden] → f32 [T, hidden], and its share [T] before the sigmoid."""
        linear, mlp = self._ops.linear, self.here
        middle = torch.empty(len(x), mlp.down.columns)
        self._ops.trunk.gate(linear.linears([mlp.gate, mlp.up], x), mlp.activation, middle)
        out = linear.linear(mlp.down, middle)
        return out, None if mlp.share is None else linear.linear(mlp.share, x)[:, 0]

    async def forward(self, x: torch.Tensor, sent: torch.Tensor, experts: ExpertBackend) -> Addend:
        """See Mlp."""
        with timeline.current.span("dense"):
            return Addend(self.compute(x)[0])


class MoeMlp:
    """Routed experts, computed elsewhere; while they are, the shared expert here."""

    def __init__(self, ops: Ops, ordinal: int, router: Router, shared: DenseMlp | None = None) -> None:
        """`ordinal`: of the MoE layer."""
        self.ordinal = ordinal
        self.router = router
        self.here = None if shared is None else shared.here
        self._ops = ops
        self._native = router.layer.structure()
        self._shared = shared

    def foresee(self, x: torch.Tensor) -> list[int]:
        """Experts that this layer may ask for, likeliest first, judged by `x` f32 [T, hidden] of an earlier layer."""
        return likely(self.router.layer, self._ops.linear.linear(self.router.weights, x))

    async def forward(self, x: torch.Tensor, sent: torch.Tensor, experts: ExpertBackend) -> Addend:
        """See Mlp."""
        with timeline.current.span("router"):
            shape = len(x), self.router.layer.top_k
            ids, weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
            logits = self._ops.linear.linear(self.router.weights, x)
            self._ops.trunk.route(self._native, logits, ids, weights)
            if (tiers := tiers_of(experts)) is not None:
                spare_disks(tiers, self.ordinal, self.router.layer, logits, ids, weights)
        self._ops.trunk.rest()
        pending = experts.submit(self.ordinal, sent, ids, weights)
        more = gate = None
        if self._shared is not None:
            with timeline.current.span("shared expert"):
                more, gate = self._shared.compute(x)
            self._ops.trunk.rest()
        return Addend(await pending, more, gate)
