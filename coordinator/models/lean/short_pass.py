"""Forward passes of few tokens, decoding above all: two native calls a layer, in memory that stays.

Between two calls Python takes three to four times as long as elsewhere, for the weights have just emptied the caches.
What is here are the decisions that are Python's: what to ask the experts' backend, and when to wait.
"""

import torch

from moehive.kernels.layer import DecoderLayer, Step
from moehive.kernels.trunk_ops import RouterLayer

from ... import timeline
from ..base import ExpertBackend, take_back_of, tiers_of
from .batch import Batch, Ops
from .foresight import FEW_TOKENS as FORESEEN_TOKENS
from .foresight import LAYERS as FORESEEN_LAYERS
from .foresight import spare_disks
from .mlp import MoeMlp
from .parts import Layer, Parts


class ShortPasses:
    """One trunk's. Passes may take turns, each in memory of its own."""

    def __init__(self, parts: Parts, ops: Ops) -> None:
        self._parts = parts
        self._ops = ops
        self._layers: list[tuple[DecoderLayer, Layer, list[Layer]]] = []  # with the next layers that have experts
        self._router: RouterLayer | None = None  # any layer's, for the sizes, which all have in common
        self._free: list[Step] = []
        native: DecoderLayer | None = None
        for number, layer in enumerate(parts.layers):
            native = DecoderLayer(
                ops.trunk,
                norm=layer.attention_norm,
                mixer=layer.attention.mixer,
                mlp_norm=layer.mlp_norm,
                eps=parts.eps,
                router=layer.mlp.router,
                mlp=layer.mlp.here,
                before=native,
            )
            later = [one for one in parts.layers[number + 1 :] if isinstance(one.mlp, MoeMlp)]
            self._layers.append((native, layer, later[:FORESEEN_LAYERS]))
            if layer.mlp.router is not None:
                self._router = layer.mlp.router.layer

    async def forward(self, run: Batch, experts: ExpertBackend) -> torch.Tensor:
        """f32 logits [len(run.wanted), vocab] of a pass of at most FEW_TOKENS tokens."""
        step = self._free.pop() if self._free else self._new_step()
        try:
            logits = await self._pass(step, run, experts)
        except BaseException:
            step.drop()  # and it isn't used again: a message that nobody waits for may still be leaving from it
            raise
        self._free.append(step)
        return logits

    async def _pass(self, step: Step, run: Batch, experts: ExpertBackend) -> torch.Tensor:
        tiers, take_back = tiers_of(experts), take_back_of(experts)
        step.begin(run.tokens, run.sequences, run.tables, run.states, run.cos, run.sin)
        step.hidden.copy_(self._parts.embedding.rows(run.ids))
        add: torch.Tensor | None = None  # of the layer before, by its routed experts
        for native, layer, later in self._layers:
            with timeline.current.span("attention"):
                native.mix(step, add)
            if add is not None and take_back is not None:
                take_back(add)
            if tiers is not None and later and run.tokens <= FORESEEN_TOKENS:
                with timeline.current.span("foresee"):
                    tiers.expect([self._likely(one, step.hidden) for one in later])
            mlp = layer.mlp
            if isinstance(mlp, MoeMlp):
                if tiers is not None:
                    spare_disks(tiers, mlp.ordinal, mlp.router.layer, step.logits, step.ids, step.weights)
                pending = experts.submit(mlp.ordinal, step.sent, step.ids, step.weights)
                if mlp.here is not None:
                    with timeline.current.span("shared expert"):
                        native.mlp(step)
                add = await pending
                if mlp.here is not None and timeline.current.on and (times := step.beside()) is not None:
                    timeline.current.beside("shared expert", *times)
            else:
                with timeline.current.span("dense"):
                    native.mlp(step)
                add = None
        with timeline.current.span("lm head"):
            logits = self._layers[-1][0].logits(step, add, self._parts.norm, self._parts.head, run.wanted)
        if add is not None and take_back is not None:
            take_back(add)
        return logits

    def _new_step(self) -> Step:
        parts = self._parts
        return Step(len(parts.norm), self._router, half=parts.dtype != torch.float32)

    def _likely(self, layer: Layer, hidden: torch.Tensor) -> list[int]:
        """Experts that `layer` may ask for, judged by the residual stream `hidden` of an earlier one."""
        assert isinstance(layer.mlp, MoeMlp)
        x = torch.empty_like(hidden)
        self._ops.trunk.add_norm(hidden, norm=layer.mlp_norm, eps=self._parts.eps, out=x)
        return layer.mlp.foresee(x)
