"""The node's door: requests of the one coordinator, each answered on the stream that brought it.

A decode request is computed on the event loop's thread, the one that read it: going to another thread and back
costs more than the wait. What takes longer goes to a worker, so that heartbeats go on; replies may overtake.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, TypeAlias

import grpc
import grpc.aio
import torch

from moehive.kernels.ops import Reduction
from moehive.proto import experts_pb2 as pb
from moehive.proto import experts_pb2_grpc
from moehive.proto.channel import COORDINATOR_NAME, peer_names
from moehive.proto.tensors import Routing, read_request, write_values
from moehive.proto.tiers import read_likely, write_on_disk

from .executor import Executor
from .types import NodeError

log = logging.getLogger(__name__)

# Multiply-adds above which a request goes to the worker. 100 million read 200 MB of bf16 weights at one token,
# some 10 ms on a home machine; a thread's hand-over is about 0.1 ms.
LARGE_WORK = 100_000_000
# Requests of one stream that the worker has or is yet to take; beyond it the stream is not read: the sender waits.
MAX_WAITING = 8
BUSY_SECONDS = 0.5  # after a request, copies to other nodes are still paced

REDUCTIONS = {
    pb.REDUCTION_PARTIAL_SUM: Reduction.PARTIAL_SUM,
    pb.REDUCTION_PER_EXPERT: Reduction.PER_EXPERT,
}

Context: TypeAlias = grpc.aio.ServicerContext[pb.ComputeRequest, pb.ComputeReply]


class ExpertsService(experts_pb2_grpc.ExpertsServicer):
    """Experts.Compute. `draining` set: every further request is refused."""

    def __init__(self, executor: Executor) -> None:
        self.draining = False
        self._asked_at = 0.0  # seconds, monotonic clock
        self._executor = executor
        self._in_worker = 0  # requests that the worker has or is yet to take, of all streams
        # One: the kernels spread each request over their own threads.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")

    async def Compute(self, request_iterator: Any, context: Context) -> None:
        """Serves one stream until the coordinator ends it. Raises WireError and DecodeError (see `serve`)."""
        if not self.may_ask(context):
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "Only the coordinator may ask an expert node to compute."
            )
        writing = asyncio.Lock()  # gRPC takes one write at a time
        room = asyncio.Semaphore(MAX_WAITING)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while (request := await context.read()) is not grpc.aio.EOF:
                self._asked_at = monotonic()
                hidden, routing = read_request(request)
                likely = read_likely(request)
                # Behind a large request a small one would wait for the kernels' lock, and the loop with it.
                # One that waits for the disk would hold up the loop, too.
                small = self._executor.work(request.layer, len(routing.experts)) <= LARGE_WORK
                small = small and self._executor.in_memory(request.layer, routing)
                if small and not self._in_worker:
                    reply = self._answer(request, hidden, routing, likely)
                    async with writing:
                        await context.write(reply)
                else:
                    await room.acquire()
                    self._in_worker += 1
                    task = asyncio.create_task(self._answer_later(request, hidden, routing, likely, context, writing))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    task.add_done_callback(lambda _: self._leave_worker(room))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def may_ask(self, context: Context) -> bool:
        """Whether the caller may have experts computed: the coordinator, by its certificate."""
        return COORDINATOR_NAME in peer_names(context)

    @property
    def busy(self) -> bool:
        """Whether requests come in now."""
        return monotonic() - self._asked_at < BUSY_SECONDS

    async def close(self) -> None:
        """Waits for the worker's request in hand and drops those that wait for it."""
        await asyncio.to_thread(self._worker.shutdown, cancel_futures=True)

    def _leave_worker(self, room: asyncio.Semaphore) -> None:
        self._in_worker -= 1
        room.release()

    async def _answer_later(
        self,
        request: pb.ComputeRequest,
        hidden: torch.Tensor,
        routing: Routing,
        likely: list[int],
        context: Context,
        writing: asyncio.Lock,
    ) -> None:
        loop = asyncio.get_running_loop()
        reply = await loop.run_in_executor(self._worker, self._answer, request, hidden, routing, likely)
        async with writing:
            await context.write(reply)

    def _answer(
        self, request: pb.ComputeRequest, hidden: torch.Tensor, routing: Routing, likely: list[int]
    ) -> pb.ComputeReply:
        """The rows or a refusal."""
        if self.draining:
            return _refusal(request, pb.Refusal.REASON_DRAINING, "This node is leaving; ask the others.")
        if request.epoch < self._executor.store.first_epoch:
            return _refusal(
                request,
                pb.Refusal.REASON_STALE_EPOCH,
                f"Epoch {request.epoch} is of another model; this node follows {self._executor.store.first_epoch}.",
            )
        try:
            reduction = REDUCTIONS[request.reduction]
            rows, elapsed = self._executor.compute(request.layer, hidden, routing, reduction, likely)
        except KeyError as error:
            return _refusal(
                request,
                pb.Refusal.REASON_EXPERT_MISSING,
                f"This node does not hold expert {error.args[0]} of layer {request.layer}; assign it first.",
            )
        except NodeError as error:
            return _refusal(request, pb.Refusal.REASON_FAILED, str(error))
        except (RuntimeError, MemoryError) as error:  # torch and the native library
            log.error("Layer %d of epoch %d failed: %s", request.layer, request.epoch, error)
            return _refusal(request, pb.Refusal.REASON_FAILED, f"The arithmetic failed on this node: {error}"[:1024])
        reply = pb.ComputeReply(id=request.id, compute_ns=elapsed)
        write_values(reply, rows, request.dtype)
        tier = self._executor.store.tier
        if tier is not None:
            write_on_disk(reply, tier.on_disk(request.layer))
        return reply


def _refusal(request: pb.ComputeRequest, reason: pb.Refusal.Reason, sentence: str) -> pb.ComputeReply:
    return pb.ComputeReply(id=request.id, refusal=pb.Refusal(reason=reason, sentence=sentence))
