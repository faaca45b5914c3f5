"""One node's link: one persistent stream, many requests in flight, a deadline for each, bounded on both sides.

Whatever ends the stream ends every request on it with NodeUnavailable, so that nobody waits for a machine that is
gone. A new stream is opened by whoever hears that the node is back (coordinator/follower.py).
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic

import grpc
import grpc.aio

from moehive.proto import experts_pb2 as pb
from moehive.proto import experts_pb2_grpc
from moehive.proto.channel import Identity, node_dns_name, open_channel
from moehive.proto.handshake import metadata

from ..types import NodeName, NodeUnavailable

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 64  # requests on one stream; further ones wait here
CONNECT_SECONDS = 10.0
REPLY_SECONDS = 60.0  # a layer of a prefill chunk on a slow machine takes seconds; a silent node must not hang us


@dataclass(slots=True)
class _Pending:
    reply: "asyncio.Future[pb.ComputeReply]"
    deadline: float  # seconds, monotonic clock


class Link:
    """The stream to one node. Use it on the event loop that opened it."""

    def __init__(self, node: NodeName, address: str, identity: Identity, on_close: Callable[[], None]) -> None:
        self.node = node
        self.address = address
        self._channel = open_channel(address, identity, node_dns_name(node))
        self._on_close = on_close
        self._pending: dict[int, _Pending] = {}
        self._sent: set[int] = set()  # of those: on the stream
        self._next_id = 1
        self._room = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._outgoing: asyncio.Queue[pb.ComputeRequest] = asyncio.Queue()
        self._call: grpc.aio.StreamStreamCall[pb.ComputeRequest, pb.ComputeReply] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: str | None = None

    async def open(self) -> None:
        """Connects and starts the stream. Raises NodeUnavailable within CONNECT_SECONDS."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_SECONDS)
        except TimeoutError:
            await self._channel.close()
            raise NodeUnavailable(
                self.node,
                f"Node {self.node} does not answer at {self.address} within {CONNECT_SECONDS:.0f} s: check that its "
                "address can be reached from the coordinator and that no firewall is in between.",
            ) from None
        stub = experts_pb2_grpc.ExpertsStub(self._channel)
        self._call = stub.Compute(metadata=metadata())
        self._tasks = [asyncio.create_task(task) for task in (self._read(), self._write(), self._watch())]

    def send(self, request: pb.ComputeRequest) -> "asyncio.Future[pb.ComputeReply]":
        """Puts one request on the stream, or in line for a place among MAX_IN_FLIGHT; sets the request's id.

        The future has the reply. It raises NodeUnavailable, as this does, when the node is gone or stays silent for
        REPLY_SECONDS. Whoever no longer wants the reply cancels the future.
        """
        if self._call is None or self._failure is not None:
            raise NodeUnavailable(self.node, self._failure or f"Node {self.node} is not connected.")
        request.id = self._next_id
        self._next_id += 1
        future: asyncio.Future[pb.ComputeReply] = asyncio.get_running_loop().create_future()
        self._pending[request.id] = _Pending(future, monotonic() + REPLY_SECONDS)
        future.add_done_callback(partial(self._settled, request.id))
        self._outgoing.put_nowait(request)
        return future

    async def close(self, sentence: str) -> None:
        """Ends the stream; requests in flight fail with `sentence`."""
        self._fail(sentence)
        for task in self._tasks:
            task.cancel()
        if self._call is not None:
            self._call.cancel()
        await self._channel.close()

    async def _read(self) -> None:
        call = self._call
        assert call is not None
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                pending = self._pending.get(reply.id)
                if pending is not None and not pending.reply.done():  # else: its request was cancelled
                    pending.reply.set_result(reply)
            sentence = f"Node {self.node} ended the connection; the request can be sent again once it is back."
        except grpc.aio.AioRpcError as error:
            sentence = _sentence(self.node, error)
        self._fail(sentence)

    async def _write(self) -> None:
        """The one writer: gRPC takes one message at a time, and a sender need not wait for it."""
        call = self._call
        assert call is not None
        try:
            while True:
                request = await self._outgoing.get()
                if request.id in self._pending:  # else: cancelled while it was in line
                    await self._room.acquire()
                    self._sent.add(request.id)
                    await call.write(request)
        except grpc.aio.AioRpcError as error:
            self._fail(_sentence(self.node, error))
        except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:  # the stream has ended
            self._fail(_sentence(self.node, error))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = monotonic()
            if any(pending.deadline < now for pending in self._pending.values()):
                self._fail(
                    f"Node {self.node} did not answer within {REPLY_SECONDS:.0f} s; it is taken for lost until it "
                    "joins again."
                )
                if self._call is not None:
                    self._call.cancel()
                return

    def _settled(self, request_id: int, _: object) -> None:
        self._pending.pop(request_id, None)
        if request_id in self._sent:
            self._sent.discard(request_id)
            self._room.release()

    def _fail(self, sentence: str) -> None:
        if self._failure is not None:
            return
        self._failure = sentence
        for pending in list(self._pending.values()):
            if not pending.reply.done():
                pending.reply.set_exception(NodeUnavailable(self.node, sentence))
        self._on_close()


def _sentence(node: NodeName, error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        detail = (error.details() or error.code().name)[:512]
        return f"Node {node} is unavailable ({detail}); the request can be sent again once it is back."
    return f"Node {node} is unavailable; the request can be sent again once it is back."
