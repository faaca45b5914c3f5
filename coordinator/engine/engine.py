"""Many generations at once over one trunk.

Each sequence is a task on the loop that runs its own steps; `batches.py` puts the steps that are ready at the same
time into one forward pass. A pass awaits its experts at every MoE layer, and there the other passes go on.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from time import monotonic

from .. import timeline
from ..models.base import ExpertBackend, SequenceInput, Trunk
from ..types import CoordinatorError, FinishReason, GenerationRequest, InvalidRequest, NotReady
from .batches import Batches
from .kvcache import KVBudget
from .sampler import Sampler
from .scheduler import Scheduler
from .sequence import Event, Finished, Sequence
from .validate import check_request

MAX_WAITING = 64  # generations in line for KV cache; more are refused


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine does now, and has done since its start."""

    running: int
    waiting: int
    kv_bytes_used: int
    kv_bytes_limit: int
    prompt_tokens: int
    generated_tokens: int
    finished: int  # generations that came to their end, cancelled ones included
    failed: int


class Engine:
    """Turns requests into streams of tokens."""

    def __init__(
        self, trunk: Trunk, experts: ExpertBackend, kv_limit_bytes: int, max_waiting: int = MAX_WAITING
    ) -> None:
        """`kv_limit_bytes` bounds all sequences' caches together; `max_waiting` those in line for room there."""
        self._trunk = trunk
        self._batches = Batches(trunk, experts)
        self._scheduler = Scheduler(KVBudget(kv_limit_bytes), max_waiting)
        self._sequences: dict[str, tuple[Sequence, asyncio.Task[Finished]]] = {}
        self._closed = False
        self._prompt_tokens = self._generated_tokens = self._finished = self._failed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields each Token, then one Finished.

        Closing the generator, or cancelling whoever reads it, ends the generation within one step and frees its
        memory. Raises InvalidRequest, NoRoom, NodeUnavailable, NotReady, or what else went wrong in a step; other
        generations go on.
        """
        check_request(request, self._trunk.vocab_size, self._trunk.context_length)
        if self._closed:
            raise _stopping()
        if request.request_id in self._sequences:
            raise InvalidRequest("A generation with this request_id is running; choose another.", "request_id")
        sequence = self._new_sequence(request)
        task = asyncio.create_task(self._run(sequence))
        self._sequences[sequence.id] = sequence, task
        task.add_done_callback(lambda done: self._close(sequence, done))
        try:
            while True:
                event = await sequence.events.get()
                sequence.unread.release()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            sequence.ending = sequence.ending or FinishReason.CANCELLED
            task.cancel()
            await asyncio.wait([task])

    def cancel(self, request_id: str) -> bool:
        """Ends a generation, running or in line, within one step; False when there is none of this id."""
        return self._end(request_id, FinishReason.CANCELLED)

    def stop(self, request_id: str) -> bool:
        """As cancel, for a reader that has seen a stop string: the generation is complete."""
        return self._end(request_id, FinishReason.STOP)

    async def shutdown(self) -> None:
        """Ends every generation with NotReady and refuses new ones."""
        self._closed = True
        running = list(self._sequences.values())
        for sequence, task in running:
            sequence.ending = _stopping()
            task.cancel()
        if running:
            await asyncio.wait([task for _, task in running])

    def load(self) -> EngineLoad:
        """Counters for the status."""
        budget = self._scheduler.budget
        return EngineLoad(
            running=budget.owners,
            waiting=self._scheduler.waiting,
            kv_bytes_used=budget.used_bytes,
            kv_bytes_limit=budget.limit_bytes,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            finished=self._finished,
            failed=self._failed,
        )

    def check_integrity(self) -> None:
        """For tests: raises AssertionError when memory is held by no sequence."""
        self._scheduler.budget.check_integrity()
        assert self._scheduler.budget.owners + self._scheduler.waiting <= len(self._sequences)

    async def step(self, sequence: Sequence) -> None:
        """The next piece of the prompt, or the last token → forward → sample → publish."""
        tokens = sequence.next_input(self._trunk.prefill_chunk)
        logits = await self._batches.forward(SequenceInput(tokens, sequence.cache))
        if sequence.prompt_left:
            return
        with timeline.current.span("sample"):
            forced = sequence.request.forced
            token = sequence.sampler.next(
                logits, forced[sequence.generated] if sequence.generated < len(forced) else None
            )
        sequence.publish(token)
        self._generated_tokens += 1

    async def _run(self, sequence: Sequence) -> Finished:
        sequence.reserved_tokens = sequence.tokens_to_reserve()
        await self._scheduler.admit(sequence.id, self._trunk.cache_bytes(sequence.reserved_tokens))
        try:
            sequence.admitted_at = monotonic()
            sequence.cache = self._trunk.new_cache()
            self._prompt_tokens += len(sequence.request.prompt)
            while True:
                if sequence.prompt_left == 0:
                    await sequence.unread.acquire()
                await self.step(sequence)
                reason = sequence.reason_to_stop()
                if reason is None and not self._has_room(sequence):
                    reason = FinishReason.LENGTH
                if reason is not None:
                    return sequence.finished(reason)
        finally:
            if sequence.cache is not None:
                self._trunk.free_cache(sequence.cache)
                sequence.cache = None
            self._scheduler.leave(sequence.id)

    def _has_room(self, sequence: Sequence) -> bool:
        """Room for one more token; an open-ended sequence reserves its next stretch here."""
        if sequence.length < sequence.reserved_tokens:
            return True
        wanted = sequence.tokens_to_reserve()
        if not self._scheduler.grow(sequence.id, self._trunk.cache_bytes(wanted)):
            return False
        sequence.reserved_tokens = wanted
        return True

    def _new_sequence(self, request: GenerationRequest) -> Sequence:
        left = self._trunk.context_length - len(request.prompt)
        return Sequence(
            request,
            max_tokens=left if request.max_tokens is None else min(left, request.max_tokens),
            sampler=Sampler(request.sampling, request.prompt, self._trunk.vocab_size, request.logprobs),
        )

    def _end(self, request_id: str, reason: FinishReason) -> bool:
        entry = self._sequences.get(request_id)
        if entry is None:
            return False
        sequence, task = entry
        sequence.ending = reason
        task.cancel()
        return True

    def _close(self, sequence: Sequence, task: asyncio.Task[Finished]) -> None:
        """A sequence's task has ended, however it did: its reader always hears of it."""
        del self._sequences[sequence.id]
        outcome = _outcome(sequence, task)
        if isinstance(outcome, Finished):
            self._finished += 1
        else:
            self._failed += 1
        sequence.events.put_nowait(outcome)


def _outcome(sequence: Sequence, task: asyncio.Task[Finished]) -> Finished | BaseException:
    if not task.cancelled():
        return task.exception() or task.result()
    match sequence.ending:
        case FinishReason():
            return sequence.finished(sequence.ending)
        case Exception():
            return sequence.ending
        case None:
            return CoordinatorError("The generation was interrupted within the coordinator; send it again.")


def _stopping() -> NotReady:
    return NotReady("The coordinator is stopping; send the request again once it is back.")
