"""The node's door: requests of the one coordinator, and of nodes before this one in a chain, each answered on the
stream that brought it.

A decode request is computed on the event loop's thread, the one that read it: going to another thread and back
costs more than the wait. What takes longer goes to a worker, so that heartbeats go on; replies may overtake.
A chain's request is passed on first and computed while the next node works on it.
"""

import asyncio
import logging
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic, perf_counter_ns
from typing import Any, NamedTuple

import grpc
import grpc.aio
import torch

from moehive.kernels.ops import Reduction
from moehive.proto import experts_pb2 as pb
from moehive.proto import experts_pb2_grpc
from moehive.proto.bounds import MAX_SENTENCE
from moehive.proto.chain import check_chain
from moehive.proto.channel import COORDINATOR_NAME, peer_names
from moehive.proto.lookout import Lookout
from moehive.proto.tensors import (
    Request,
    Routing,
    WireError,
    parse_request,
    read_request,
    read_values,
    reply_pieces,
)
from moehive.proto.tiers import read_likely, write_on_disk
from moehive.proto.wire.messages import Buffer
from moehive.proto.wire.server import Context
from moehive.proto.wire.windows import Times

from .chain import ChainBroken, Onward
from .executor import Executor
from .peers import NODE_SUFFIX
from .plain import PlainRequests
from .types import NodeError

log = logging.getLogger(__name__)

# Requests of one stream that the worker has or is yet to take; beyond it the stream is not read: the sender waits.
MAX_WAITING = 8
# Requests of one stream that wait for the rest of their chain; each holds at most MAX_CHAIN_BYTES of hidden states.
MAX_CHAINED = 32
MAX_PASSING_ON = 64  # streams of other nodes at once
BUSY_SECONDS = 0.5  # after a request, copies to other nodes are still paced

REDUCTIONS = {
    pb.REDUCTION_PARTIAL_SUM: Reduction.PARTIAL_SUM,
    pb.REDUCTION_PER_EXPERT: Reduction.PER_EXPERT,
}


class Came(NamedTuple):
    """A request that came whole, and when."""

    head: pb.ComputeRequest
    hidden: torch.Tensor
    routing: Routing
    read_at: int  # nanoseconds, as of Times
    came_at: int
    times: Times  # of its stream
    own: bool = False  # nobody else needs `hidden` any more


class ExpertsService(experts_pb2_grpc.ExpertsServicer):
    """Experts.Compute. `draining` set: every further request is refused."""

    def __init__(self, executor: Executor, onward: Onward) -> None:
        self.draining = False
        self._onward = onward
        self._passing_on = 0  # streams of other nodes
        self._asked_at = 0.0  # seconds, monotonic clock
        self._executor = executor
        self._plain = PlainRequests(executor)
        self._lookout = Lookout()  # for the next request
        self._expected = False  # whether one was, before the last reading
        self._in_worker = 0  # requests that the worker has or is yet to take, of all streams
        # One: the kernels spread each request over their own threads.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="experts")

    async def Compute(self, request_iterator: Any, context: Context) -> None:
        """Serves one stream until the coordinator ends it. Raises WireError and DecodeError, for CallGuard."""
        if not self.may_ask(context):
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "Only the coordinator may ask an expert node to compute."
            )
        await self._serve(context, passed_on=False)

    async def PassOn(self, request_iterator: Any, context: Context) -> None:
        """As Compute, for a node of the cluster."""
        if not any(name.endswith(NODE_SUFFIX) for name in peer_names(context)):
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "Only nodes of this cluster may pass on what a chain is asked."
            )
        if self._passing_on >= MAX_PASSING_ON:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many nodes pass on to this one now.")
        self._passing_on += 1
        try:
            await self._serve(context, passed_on=True)
        finally:
            self._passing_on -= 1

    def may_ask(self, context: Context) -> bool:
        """Whether the caller may have experts computed: the coordinator, by its certificate."""
        return COORDINATOR_NAME in peer_names(context)

    async def _serve(self, context: Context, passed_on: bool) -> None:
        room, chained = asyncio.Semaphore(MAX_WAITING), asyncio.Semaphore(MAX_CHAINED)
        tasks: set[asyncio.Task[None]] = set()
        context.answer_at_once(partial(self._at_once, context.times))
        if self._plain.function:
            context.take_natively(self)
        try:
            while await self._serve_next(context, passed_on, room, chained, tasks):
                pass  # and nothing is kept here of a request whose answer may be long
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _serve_next(
        self,
        context: Context,
        passed_on: bool,
        room: asyncio.Semaphore,
        chained: asyncio.Semaphore,
        tasks: set[asyncio.Task[None]],
    ) -> bool:
        """Answers a stream's next request, or begins to; False after the last one."""
        message = await context.read_message()
        if message is None:
            return False
        self._asked_at = monotonic()
        whole = parse_request(message)
        hidden, routing = read_request(whole)
        request, times = whole.head, context.times
        # A large message has memory of its own, which may be written to unless it is passed on.
        own = isinstance(whole.states, memoryview) and not whole.states.readonly and not request.chain
        came = Came(request, hidden, routing, times.read_at, times.came_at, times, own)
        if passed_on or request.chain:
            check_chain(whole)
        if request.chain:
            await chained.acquire()
            self._begin(self._answer_chain(whole, came, context), chained, tasks)
            return True
        likely = read_likely(request)
        # Behind a large request a small one would wait for the kernels' lock, and the loop with it.
        # One that waits for the disk would hold up the loop, too.
        small = self._executor.quick(request.layer, len(routing.experts))
        small = small and self._executor.in_memory(request.layer, routing)
        if small and not self._in_worker:
            await context.write(self._answer(came, likely))
            self._lookout.expect()
        else:
            await room.acquire()
            self._begin(self._answer_later(came, likely, context), room, tasks)
        return True

    def _at_once(self, times: Times, message: Buffer) -> tuple[bytes] | None:
        """The reply to a plain request that came in pieces; None while a worker computes, or this node leaves."""
        if not self.ready():
            return None
        reply = self._plain.answer(message, times)
        if reply is None:
            return None
        self._asked_at = monotonic()
        self._lookout.expect()
        return (reply,)

    @property
    def function(self) -> int:
        """See Taker."""
        return self._plain.function

    @property
    def context(self) -> int:
        """See Taker."""
        return self._plain.context

    def ready(self) -> bool:
        """See Taker."""
        self._expected = self._lookout.expected > 0
        self._lookout.came()
        return not self._in_worker and not self.draining and self._plain.ready()

    @property
    def patience(self) -> tuple[int | None, int]:
        """See Taker: while requests come one after the other."""
        return self._lookout.patience() if self.busy else (None, 0)

    def took(self, messages: int) -> None:
        """See Taker."""
        if messages:
            self._asked_at = monotonic()
            self._plain.answered()
        if messages or self._expected:
            self._lookout.expect()

    @property
    def busy(self) -> bool:
        """Whether requests come in now."""
        return monotonic() - self._asked_at < BUSY_SECONDS

    async def close(self) -> None:
        """Waits for the worker's request in hand and drops those that wait for it."""
        await asyncio.to_thread(self._worker.shutdown, cancel_futures=True)

    def _begin(
        self, answering: Coroutine[Any, Any, None], room: asyncio.Semaphore, tasks: set[asyncio.Task[None]]
    ) -> None:
        """Answers a request of a stream's `tasks` beside the loop; it has its place in `room`."""
        self._in_worker += 1
        task = asyncio.create_task(answering)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(lambda _: self._leave_worker(room))

    def _leave_worker(self, room: asyncio.Semaphore) -> None:
        self._in_worker -= 1
        room.release()

    async def _answer_later(self, came: Came, likely: list[list[int]], context: Context) -> None:
        loop = asyncio.get_running_loop()
        computing = loop.run_in_executor(self._worker, self._answer, came, likely)
        del came  # its hidden states may be as large as the reply
        await context.write(await computing)

    def _answer(self, came: Came, likely: list[list[int]]) -> tuple[Buffer, ...]:
        """The rows or a refusal, as a reply's bytes in pieces."""
        request = came.head
        try:
            rows, reply = self._rows(came, likely)
        except Refused as refused:
            return refused.reply(request)
        on_disk = self._executor.on_disk(request.layer)
        if on_disk is not None:
            write_on_disk(reply, on_disk)
        return reply_pieces(reply, rows, request.dtype)

    def _rows(self, came: Came, likely: list[list[int]]) -> tuple[torch.Tensor, pb.ComputeReply]:
        """What this node computes of a request, and the reply but for that. Raises Refused."""
        request, began, times = came.head, perf_counter_ns(), came.times
        if self.draining:
            raise Refused(pb.Refusal.REASON_DRAINING, "This node is leaving; ask the others.")
        if request.epoch < self._executor.store.first_epoch:
            raise Refused(
                pb.Refusal.REASON_STALE_EPOCH,
                f"Epoch {request.epoch} is of another model; this node follows {self._executor.store.first_epoch}.",
            )
        try:
            rows, elapsed = self._executor.compute(
                request.layer, came.hidden, came.routing, REDUCTIONS[request.reduction], likely, came.own
            )
        except KeyError as error:
            raise Refused(
                pb.Refusal.REASON_EXPERT_MISSING,
                f"This node does not hold expert {error.args[0]} of layer {request.layer}; assign it first.",
            ) from None
        except NodeError as error:
            raise Refused(pb.Refusal.REASON_FAILED, str(error)) from None
        except (RuntimeError, MemoryError) as error:  # torch and the native library
            log.error("Layer %d of epoch %d failed: %s", request.layer, request.epoch, error)
            raise Refused(pb.Refusal.REASON_FAILED, f"The arithmetic failed on this node: {error}") from None
        reply = pb.ComputeReply(
            id=request.id,
            compute_ns=elapsed,
            began_ns=began,
            reading_ns=came.came_at - came.read_at,
            waited_ns=began - came.came_at,
            wrote_ns=max(0, times.sent_at - times.ready_at) if times.ready_at else 0,
        )
        times.ready_at = began + elapsed
        return rows, reply

    async def _answer_chain(self, whole: Request, came: Came, context: Context) -> None:
        """Passes a request on, computes meanwhile, and answers with the sum of all that come after and its own."""
        request, hidden = came.head, came.hidden
        onward = asyncio.create_task(self._onward.ask(whole))
        loop = asyncio.get_running_loop()
        own = loop.run_in_executor(self._worker, self._rows, came, [])
        await asyncio.gather(own, onward, return_exceptions=True)
        try:
            rows, head = own.result()
            rest = onward.result()
            theirs = read_values(rest, len(hidden), hidden.shape[1], hidden.dtype)
        except Refused as refused:
            reply = refused.reply(request)
        except ChainBroken as broken:
            reply = Refused(pb.Refusal.REASON_FAILED, str(broken), broken.node).reply(request)
        except WireError as error:
            node = request.chain[0].node_name
            sentence = f"Node {node} answered something else than asked: {error}"
            reply = Refused(pb.Refusal.REASON_FAILED, sentence, node).reply(request)
        else:
            head.chain_ns.extend([rest.head.compute_ns, *rest.head.chain_ns])
            came.times.ready_at = 0  # what came between its own rows and their sum is no writing
            # In place: the rows are nobody else's.
            reply = reply_pieces(head, rows.float().add_(theirs).to(hidden.dtype), request.dtype)
        await context.write(reply)


class Refused(NodeError):
    """A request that is not computed, and why, in one sentence; `node`: who it is about, if not this one."""

    def __init__(self, reason: pb.Refusal.Reason, sentence: str, node: str = "") -> None:
        super().__init__(sentence)
        self._refusal = pb.Refusal(reason=reason, sentence=sentence[:MAX_SENTENCE], node_name=node)

    def reply(self, request: pb.ComputeRequest) -> tuple[Buffer, ...]:
        """The answer to the request, as `ExpertsService` sends it."""
        return (pb.ComputeReply(id=request.id, refusal=self._refusal).SerializeToString(),)
