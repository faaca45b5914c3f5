"""The lean trunk on a GPU: the same parts as the CPU's, another way to compute them.

Weights lie in the GPU's memory in their own formats, as do the sequences' pages and states; the table of tokens stays
in main memory. While routed experts are computed elsewhere, the GPU computes the shared one.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from triton import next_power_of_2

from moehive.kernels.gpu.failures import why
from moehive.kernels.gpu.graphs import Recorder
from moehive.kernels.gpu.linear import GpuLinears
from moehive.kernels.linear import FEW_TOKENS
from moehive.kernels.trunk_ops import RouterLayer

from .... import timeline
from ....types import CoordinatorError, NoRoom
from ...base import ExpertBackend, SequenceInput, Tiers, take_back_of, tiers_of
from ..batch import Batch, Ops
from ..cache import SequenceCache
from ..foresight import FEW_TOKENS as FORESEEN_TOKENS
from ..foresight import LAYERS as FORESEEN_LAYERS
from ..foresight import likely, spare_disks
from ..mlp import MoeMlp
from ..parts import Layer, Parts
from ..trunk import PREFILL_CHUNK
from .layer import GpuLayer
from .step import GpuStep, Sizes


class GpuTrunk:
    """`models.base.Trunk` of the families that `lean/families.py` knows, on one GPU. Use it from one thread."""

    def __init__(self, parts: Parts, ops: Ops, device: torch.device, cache_room: int | None = None) -> None:
        """Moves the weights; `ops` of the CPU prepare a pass. `device` is a GPU, or the CPU in Triton's interpreter.

        `cache_room`: see Trunk. Raises PlanesError, or torch's OutOfMemoryError.
        """
        self.family = parts.family
        self.vocab_size = parts.head.rows
        self.context_length = parts.context_length
        self.prefill_chunk = min(PREFILL_CHUNK, parts.context_length)
        self.max_sequences = FEW_TOKENS
        self.cache_room = cache_room
        self._ops = ops
        self._device = device
        self._embedding, self._rope, self._cache = parts.embedding, parts.rope, parts.cache.on(device)
        self._sizes = Sizes.of(parts)
        self._recorder = Recorder(device) if device.type == "cuda" else None
        self._free: dict[int, list[GpuStep]] = {}  # by rows
        before: GpuLayer | None = None
        self._layers: list[tuple[GpuLayer, _Moe | None]] = []
        for layer in parts.layers:
            before = GpuLayer(layer, parts.eps, before, device)
            self._layers.append((before, _moe(layer)))
        with_experts = [(layer, moe) for layer, moe in self._layers if moe is not None]
        self._later = {
            moe.ordinal: with_experts[number + 1 : number + 1 + FORESEEN_LAYERS]
            for number, (_, moe) in enumerate(with_experts)
        }
        self._norm = parts.norm.to(device)
        self._head = GpuLinears([parts.head], device)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of KV cache and states of a sequence of `tokens`."""
        return self._cache.nbytes(tokens, self.prefill_chunk)

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        return self._cache.new()

    def free_cache(self, cache: SequenceCache) -> None:
        """Gives the pages back to their pools."""
        cache.clear()

    async def forward(self, batch: Sequence[SequenceInput], experts: ExpertBackend) -> list[torch.Tensor]:
        """See `Trunk.forward`. Sums are in f32; the GPU's rounding depends on how many tokens a pass has.

        Raises NoRoom when others have taken the GPU's memory, and CoordinatorError when it fails.
        """
        try:
            return await self._forward(batch, experts)
        except torch.OutOfMemoryError as error:
            raise NoRoom(
                "The GPU's memory is full; end what else uses it, or give the coordinator a smaller --kv-memory."
            ) from error
        except torch.AcceleratorError as error:
            raise CoordinatorError(
                f"The GPU failed ({why(error)}); restart the coordinator, with --trunk-device cpu if it fails again."
            ) from error

    async def _forward(self, batch: Sequence[SequenceInput], experts: ExpertBackend) -> list[torch.Tensor]:
        run = Batch(batch, self._rope, self._ops)
        step = self._begin(run)
        tiers, take_back = tiers_of(experts), take_back_of(experts)
        for number, (layer, moe) in enumerate(self._layers):
            with timeline.current.span("attention"):
                step.run((number, "mix"), partial(layer.mix, step))
                if moe is None:
                    continue
                step.wait()
            if tiers is not None:
                self._look_ahead(tiers, moe, step)
            pending = experts.submit(moe.ordinal, step.sent, step.ids, step.weights)
            if layer.shares:
                with timeline.current.span("shared expert"):
                    step.run((number, "share"), partial(layer.share, step))
            add = await pending
            step.answer(add)
            if take_back is not None:
                take_back(add)
        with timeline.current.span("lm head"):
            logits = self._logits(step, run)
        step.end()
        if step.rows <= FEW_TOKENS:
            self._free.setdefault(step.rows, []).append(step)  # not after an error: a message may still be leaving
        run.finish()
        parts = logits.split(run.counts)
        return [part if one.all_logits else part[0] for one, part in zip(batch, parts, strict=True)]

    def _begin(self, run: Batch) -> GpuStep:
        """A step with the pass's tokens in it."""
        tokens, whole = run.tokens, run.tokens > FEW_TOKENS
        if whole:
            pages = max([len(table.numbers) for span in run.spans for table in span.cache.tables], default=0)
            step = GpuStep(self._sizes, tokens, len(run.spans), self._device, None, pages)
        else:
            rows = next_power_of_2(tokens)
            free = self._free.get(rows)
            if free:
                step = free.pop()
            else:
                step = GpuStep(self._sizes, rows, rows, self._device, self._recorder, self._sizes.pages)
        step.begin(run, self._embedding.rows(run.ids), whole)
        return step

    def _look_ahead(self, tiers: Tiers, moe: "_Moe", step: GpuStep) -> None:
        """Tells nodes with slow disks what may follow, and spares them where it may."""
        later = self._later[moe.ordinal]
        if later and len(step.ids) <= FORESEEN_TOKENS:
            with timeline.current.span("foresee"):
                tiers.expect([likely(one.router, layer.likely(step, len(step.ids))) for layer, one in later])
        spare_disks(tiers, moe.ordinal, moe.router, step.logits, step.ids, step.weights)

    def _logits(self, step: GpuStep, run: Batch) -> torch.Tensor:
        """f32 logits [len(run.wanted), vocab] in main memory."""
        last, _ = self._layers[-1]
        last.add(last, step, self._norm)
        wanted = step.x[: run.tokens] if len(run.wanted) == run.tokens else step.x[run.wanted.to(self._device)]
        return self._head(wanted).cpu()


class _Moe(NamedTuple):
    """What a pass needs of a layer's routed experts. `ordinal`: of the MoE layer."""

    ordinal: int
    router: RouterLayer


def _moe(layer: Layer) -> _Moe | None:
    return _Moe(layer.mlp.ordinal, layer.mlp.router.layer) if isinstance(layer.mlp, MoeMlp) else None
