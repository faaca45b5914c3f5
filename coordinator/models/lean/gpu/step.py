"""One pass's memory on a GPU, and in main memory for what goes to and fro.

A pass of few tokens takes a step that stays: its buffers never move, so each of its segments is recorded as a CUDA
graph when it is used a second time, and replayed from then on. All that differs from pass to pass, positions and
pages included, is copied into the step when the pass begins. A pass of many tokens has a step of its own size.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch

from moehive.kernels.gpu.batch import DeviceBatch, Rows
from moehive.kernels.gpu.experts import empty
from moehive.kernels.gpu.graphs import Recorder
from moehive.kernels.gpu.planes import ALIGNMENT
from moehive.kernels.trunk_ops import PAGE

from ..batch import Batch
from ..parts import Parts


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a trunk's steps have in common."""

    width: int
    half: bool  # the experts are asked in bf16
    experts: int  # 0: no layer has any
    top_k: int
    angles: int  # pairs of numbers that are turned
    groups: int  # of layers with pages
    states: int  # of a sequence
    pages: int  # of the longest sequence

    @classmethod
    def of(cls, parts: Parts) -> "Sizes":
        """Of a trunk's parts."""
        routers = [layer.mlp.router.layer for layer in parts.layers if layer.mlp.router is not None]
        return cls(
            width=len(parts.norm),
            half=parts.dtype != torch.float32,
            experts=max([router.experts for router in routers], default=0),
            top_k=max([router.top_k for router in routers], default=0),
            angles=len(parts.rope.inverse),
            groups=len(parts.cache.pools),
            states=parts.cache.states,
            pages=-(-parts.context_length // PAGE),
        )


class GpuStep:
    """Memory for a pass of up to `rows` tokens of up to `sequences` sequences.

    Between layers: `hidden` f32 [rows, width] is the residual stream, `x` what a layer's MLP takes, `added` what the
    routed experts of the layer before gave, `more` and `share` what was computed here instead or beside it. `sent`,
    `ids`, `weights` and `logits` are in main memory, of the pass's tokens alone; `wait` before they are read.
    """

    sent: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor

    def __init__(
        self, sizes: Sizes, rows: int, sequences: int, device: torch.device, recorder: Recorder | None, pages: int
    ) -> None:
        """`recorder`: None for a step that is used once, or without CUDA; `pages` of a sequence, at most."""
        self.rows, self._sizes, self._device, self._recorder = rows, sizes, device, recorder
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._passes = 0
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        dtype = torch.bfloat16 if sizes.half else torch.float32

        def both(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
            """Of the same shape on the device and in main memory."""
            main = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
            return torch.zeros(shape, dtype=dtype, device=device), main

        self.x, self.mixed, self.more = (torch.zeros(rows, sizes.width, device=device) for _ in range(3))
        self.share = torch.zeros(rows, 1, device=device)
        device_sent, self._sent = both(rows, sizes.width, dtype=dtype)
        self.device_sent = device_sent if sizes.half else self.x
        self.added, self._reply = both(rows, sizes.width, dtype=dtype)
        self.device_logits, self._logits = both(rows, sizes.experts)
        self.device_ids, self._ids = both(rows, sizes.top_k, dtype=torch.int64)
        self.device_weights, self._weights = both(rows, sizes.top_k)
        # What a pass begins with, each kind one copy.
        self._floats, self._main_floats = both(rows * (sizes.width + 2 * sizes.angles))
        counts = (rows, rows, sequences, sequences, sequences * sizes.states)
        self._integers, self._main_integers = both(sum(counts), dtype=torch.int64)
        tables = [both(sequences, pages, dtype=torch.int64) for _ in range(sizes.groups)]
        self._tables = [table for table, _ in tables]
        self._main_tables = [table for _, table in tables]
        widths = (sizes.width, sizes.angles, sizes.angles)
        floats = [rows * width for width in widths]
        self.hidden, cos, sin = (
            part.view(rows, width) for part, width in zip(self._floats.split(floats), widths, strict=True)
        )
        self._main_hidden, self._main_cos, self._main_sin = (
            part.view(rows, width) for part, width in zip(self._main_floats.split(floats), widths, strict=True)
        )
        owners, positions, firsts, numbers, states = self._integers.split(counts)
        self._main_parts = [part.numpy() for part in self._main_integers.split(counts)]
        base = empty(ALIGNMENT, device)
        self._base = base.data_ptr()
        self.batch = DeviceBatch(
            base=base,
            sequences=owners,
            positions=positions,
            firsts=firsts,
            counts=numbers,
            tables=self._tables,
            states=states.view(sequences, sizes.states),
            cos=cos,
            sin=sin,
            whole=None,
        )

    def begin(self, run: Batch, hidden: torch.Tensor, whole: bool) -> None:
        """A pass's tokens, whose vectors are `hidden` f32 [tokens, width].

        `whole`: attention takes whole sequences; the step must be of the pass's size.
        """
        tokens = run.tokens
        owners, positions, firsts, counts, states = self._main_parts
        owners[:], positions[:], firsts[:], counts[:] = 0, -1, 0, 0
        addresses = states.reshape(len(firsts), -1)
        used = 0
        for number, span in enumerate(run.spans):
            rows = slice(span.first, span.first + span.tokens)
            owners[rows] = number
            positions[rows] = np.arange(span.start, span.start + span.tokens)
            firsts[number], counts[number] = span.first, span.tokens
            addresses[number] = np.frombuffer(memoryview(span.cache.addresses), np.int64) - self._base
            for main, table in zip(self._main_tables, span.cache.tables, strict=True):
                pages = table.numbers - self._base
                main[number, : len(pages)].copy_(torch.from_numpy(pages))
                used = max(used, len(pages))
        self._main_hidden[:tokens].copy_(hidden)
        self._main_hidden[tokens:].zero_()
        self._main_cos[:tokens].copy_(run.cos)
        self._main_sin[:tokens].copy_(run.sin)
        self._floats.copy_(self._main_floats, non_blocking=True)
        self._integers.copy_(self._main_integers, non_blocking=True)
        for there, main in zip(self._tables, self._main_tables, strict=True):
            there[:, :used].copy_(main[:, :used], non_blocking=True)
        if whole:
            self.batch.whole = [Rows(span.first, span.tokens, span.start) for span in run.spans]
        self.sent, self.ids, self.weights, self.logits = (
            one[:tokens] for one in (self._sent, self._ids, self._weights, self._logits)
        )

    def run(self, name: Hashable, segment: Callable[[], None]) -> None:
        """Launches a segment: as a graph, once the kernels in it have been compiled by a pass before."""
        if self._recorder is None or self._passes == 0:
            segment()
            return
        graph = self._graphs.get(name)
        if graph is None:
            graph = self._graphs[name] = self._recorder.record(segment)
        graph.replay()

    def hand_over(self) -> None:
        """Of a segment: copies what the experts are asked with to main memory."""
        self._sent.copy_(self.device_sent, non_blocking=True)
        self._ids.copy_(self.device_ids, non_blocking=True)
        self._weights.copy_(self.device_weights, non_blocking=True)
        self._logits.copy_(self.device_logits, non_blocking=True)

    def wait(self) -> None:
        """Returns once the device has done all that was launched."""
        if self._event is not None:
            self._event.record()
            self._event.synchronize()

    def answer(self, reply: torch.Tensor) -> None:
        """The routed experts' sums [tokens, width], for the next segment's `take_answer`."""
        self._reply[: len(reply)].copy_(reply)

    def take_answer(self) -> None:
        """Of a segment: copies the sums to the device."""
        self.added.copy_(self._reply, non_blocking=True)

    def end(self) -> None:
        """The pass is over, and the device done with it."""
        self._passes += 1
