"""Continuous batching: which sequences' next tokens go through the trunk together, and when.

A sequence asks for one forward pass of its own (`forward`) and gets its logits; here those that ask at the same
time become one pass. Sequences that decode share passes with each other. Each piece of a prompt has a pass of its
own, which runs at the same time: a pass waits for its experts at each layer, and there the others go on, so a long
prompt delays a decoder by one layer's computation at a time, and never by a whole piece. (Not in one pass with
others: products of many rows are the fastest library's, whose bits depend on how many there are, and a text shall not
depend on who else asks. Alone, a prompt's pieces are always the same.)

A trunk that takes one sequence at a time has nothing to batch: its passes interleave layer by layer.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import torch

from .. import timeline
from ..dispatch.statistics import Pass, passing
from ..models.base import ExpertBackend, SequenceInput, Trunk
from .micro_batches import MicroBatches

PROMPT_PASSES = 2  # at once: one computes while the other waits for its experts


@dataclass(eq=False, slots=True)
class _Asked:
    """One sequence's part of a pass, from `forward` to its logits."""

    input: SequenceInput
    logits: asyncio.Future[torch.Tensor] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    running: "asyncio.Task[list[torch.Tensor]] | None" = None  # the pass that it is in


class Batches:
    """Forms passes over one trunk. Use it on one event loop."""

    def __init__(self, trunk: Trunk, experts: ExpertBackend) -> None:
        self._trunk = trunk
        self._experts = experts
        self._decoders: deque[_Asked] = deque()  # ready, first come first served
        self._prompts: deque[_Asked] = deque()
        self._decoding: list[list[_Asked]] = []  # the passes that run
        self._reading: list[list[_Asked]] = []
        self._micro_batches = MicroBatches()
        self._woken = False

    async def forward(self, one: SequenceInput) -> torch.Tensor:
        """f32 logits [vocab] of the last of `one.tokens`. Raises what the trunk raises, to all of the same pass.

        When it is cancelled, the other sequences of the pass go on; it returns once no pass uses the cache any more.
        """
        if self._trunk.max_sequences == 1:
            (logits,) = await self._pass([one])
            await asyncio.sleep(0)  # experts that never wait must not keep the loop
            return logits
        asked = _Asked(one)
        (self._decoders if len(one.tokens) == 1 else self._prompts).append(asked)
        self._wake()
        try:
            return await asked.logits
        except asyncio.CancelledError:
            await self._leave(asked)
            raise

    async def _pass(self, batch: list[SequenceInput]) -> list[torch.Tensor]:
        passing.set(Pass([(id(one.cache), len(one.tokens)) for one in batch]))  # of this task
        if not timeline.current.on:
            return await self._trunk.forward(batch, self._experts)
        tokens = sum(len(one.tokens) for one in batch)
        with timeline.current.track(f"{len(batch)} sequences, {tokens} tokens"):
            return await self._trunk.forward(batch, self._experts)

    async def _leave(self, asked: _Asked) -> None:
        """Returns once `asked` is neither in line nor in a pass that runs."""
        for line in (self._decoders, self._prompts):
            if asked in line:
                line.remove(asked)
        task = asked.running
        if task is None or task.done():
            return
        batch = next(batch for batch in (*self._decoding, *self._reading) if asked in batch)
        if all(other.logits.done() for other in batch):
            task.cancel()  # nobody wants it
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue  # it is being cancelled already, and the pass still writes to the cache

    def _wake(self) -> None:
        """Forms passes in the loop's next turn, so that all who ask in this one share them."""
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._form)

    def _form(self) -> None:
        self._woken = False
        while self._prompts and len(self._reading) < PROMPT_PASSES:
            self._start(self._reading, [self._prompts.popleft()])
        while self._decoders:
            sequences = self._sequences()
            passes = self._micro_batches.passes(sequences)
            if len(self._decoding) >= passes:
                return
            share = min(-(-sequences // passes), len(self._decoders), self._trunk.max_sequences)
            self._start(self._decoding, [self._decoders.popleft() for _ in range(share)])

    def _start(self, passes: list[list[_Asked]], batch: list[_Asked]) -> None:
        task = asyncio.create_task(self._pass([asked.input for asked in batch]))
        for asked in batch:
            asked.running = task
        passes.append(batch)
        task.add_done_callback(partial(self._ended, passes, batch))

    def _ended(
        self, passes: list[list[_Asked]], batch: list[_Asked], task: "asyncio.Task[list[torch.Tensor]]"
    ) -> None:
        if passes is self._decoding:
            sequences = self._sequences()
            now = asyncio.get_running_loop().time()
            self._micro_batches.passed(sequences, len(batch), now, alone=not self._reading)
        error = None if task.cancelled() else task.exception()
        for index, asked in enumerate(batch):
            if asked.logits.done():  # cancelled
                continue
            if task.cancelled():
                asked.logits.cancel()
            elif error is not None:
                asked.logits.set_exception(error)
                asked.logits.exception()  # seen, even when its sequence is cancelled in this turn of the loop
            else:
                asked.logits.set_result(task.result()[index])
        # Those who go on ask again in the next turn; only after it is this pass out of the way, or its sequences
        # would be missed when the others are divided.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._out, passes, batch)

    def _out(self, passes: list[list[_Asked]], batch: list[_Asked]) -> None:
        passes.remove(batch)
        self._form()

    def _sequences(self) -> int:
        """How many decode: ready, in a pass, or about to ask again."""
        asked = (*self._decoders, *(asked for batch in self._decoding for asked in batch))
        return len({id(one.input.cache) for one in asked})
