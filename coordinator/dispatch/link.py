"""One node's link: one persistent stream, many requests in flight, a deadline for each, bounded on both sides.

Whatever ends the stream ends every request on it with NodeUnavailable, so that nobody waits for a machine that is
gone. A new stream is opened by whoever hears that the node is back (coordinator/follower.py).
"""

import asyncio
import ctypes
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Protocol

import grpc.aio
import torch
from google.protobuf.message import DecodeError

from moehive.proto import experts_pb2 as pb
from moehive.proto.handshake import metadata
from moehive.proto.tensors import MAX_LAYER, Reply, head_bytes, id_piece, parse_reply, write_head
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.messages import Buffer
from moehive.proto.wire.methods import COMPUTE
from moehive.proto.wire.stream import Stream
from moehive.proto.wire.windows import Times

from ..types import NodeName, NodeUnavailable
from .native import take_function
from .speed import LinkSpeed, is_loopback

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 64  # requests on one stream; further ones wait here; also in cpp/peer.h
ID_STEP = 1_000_003  # from a request's id to the next one's: an answer with a wrong number is no other request's
FIRST_ID = 1
CONNECT_SECONDS = 10.0
PROBES = (1, 1, 1, 64, 64, 64)  # tokens of 4 KiB: what a link is measured with when it opens
REPLY_SECONDS = 60.0  # a layer of a prefill chunk on a slow machine takes seconds; a silent node must not hang us


class NativeOutlet(ctypes.Structure):
    """How messages leave on a node's stream; Outlet of cpp/peer.h, field for field."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("send", "sending", "windows"))


class Peer(ctypes.Structure):
    """A node as flights ask it; Peer of cpp/peer.h, field for field. The addresses are flights.py's to set."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("link", "speed", "counters")),
        ("next_id", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("others", "flying")),
        ("outlet", NativeOutlet),
        ("inlet", ctypes.c_void_p),
        ("waits", ctypes.c_int64),
    )

    link: int
    speed: int
    counters: int
    next_id: int  # of the next request
    others: int  # requests on the link that are no flight's
    flying: int  # those that are
    outlet: NativeOutlet
    inlet: int | None  # address of an Inlet; None: only the event loop reads what the node sends
    waits: int  # whether the node starts only when this thread leaves its processor, see cpp/flight.h


class Landing(ctypes.Structure):
    """Who takes a node's replies as they are read; Landing of cpp/peer.h, field for field."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("flights", "peer"))

    flights: int


class Flying(Protocol):
    """Who asks for layers of few tokens: flights.py."""

    handle: int  # of the native side

    def arrived(self) -> None:
        """Nodes' replies were taken natively."""

    def take(self, link: "Link", message: Buffer, times: Times) -> bool:
        """Takes a node's reply that came at `times`; False when it answers no flight, or not as usual."""

    def take_strange(self, link: "Link", reply: Reply) -> bool:
        """Takes a reply that `take` did not; False when it answers no flight."""

    def lost(self, link: "Link", error: NodeUnavailable) -> None:
        """Nothing will come of a link any more."""


@dataclass(slots=True)
class _Pending:
    reply: "asyncio.Future[Reply]"
    sent_at: float  # seconds, monotonic clock
    nbytes: int  # of the hidden states
    chained: bool  # the time of the reply is that of other links, too


class Link:
    """The stream to one node. Use it on the event loop that opened it."""

    def __init__(self, node: NodeName, address: str, channel: Channel, on_close: Callable[[], None]) -> None:
        """`channel` leads to the node's service at `address` (for messages to persons); the link closes it."""
        self.node = node
        self.address = address
        self._channel = channel
        self._on_close = on_close
        self.speed = LinkSpeed(loopback=is_loopback(address))
        self._pending: dict[int, _Pending] = {}
        self._on_stream: set[int] = set()  # ids of those that were sent
        self._line: deque[tuple[int, tuple[Buffer, ...]]] = deque()  # those that were not, by id
        self.peer = Peer(next_id=FIRST_ID)
        self.peer_at = ctypes.addressof(self.peer)
        self._flights: Flying | None = None
        self._landing = Landing(peer=self.peer_at)
        self.function = take_function()  # see Taker
        self.context = ctypes.addressof(self._landing)
        self._stream: Stream | None = None
        self._watching: asyncio.Task[None] | None = None
        self._failure: str | None = None

    async def open(self) -> None:
        """Connects and starts the stream. Raises NodeUnavailable within CONNECT_SECONDS."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):  # Python 3.11's wait_for may lose a cancellation
                stream = self._stream = await self._channel.open(COMPUTE, metadata())
        except (TimeoutError, grpc.aio.AioRpcError) as error:
            await self._channel.close()
            why = "" if isinstance(error, TimeoutError) else f" ({(error.details() or error.code().name)[:512]})"
            raise NodeUnavailable(
                self.node,
                f"Node {self.node} does not answer at {self.address}{why}: check that its address can be reached "
                "from the coordinator and that no firewall is in between.",
            ) from None
        stream.on_message = self._take
        stream.on_end = self._ended
        stream.take_natively(self)
        self.peer.outlet = NativeOutlet(*stream.outlet())
        self.peer.inlet = ctypes.addressof(stream.inlet())
        self._watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._measure()
        except TimeoutError:
            raise NodeUnavailable(
                self.node,
                f"Node {self.node} is connected but silent for {CONNECT_SECONDS:.0f} s; it is tried again.",
            ) from None

    async def _measure(self) -> None:
        """Sends requests that a node refuses at once (epoch 0 is of no model), small and large."""
        for tokens in PROBES:
            await self.send(*probe(tokens))

    def send(
        self, pieces: tuple[Buffer, ...], nbytes: int, chained: bool = False, later: float = 0.0
    ) -> "asyncio.Future[Reply]":
        """Puts one request on the stream, or in line for a place among MAX_IN_FLIGHT, `later` seconds from now.

        `pieces` are its bytes but for its id, which is given here; `nbytes` of them are hidden states; `chained`:
        other nodes answer, too. An idle stream takes it before this returns. The future has the reply. It raises
        NodeUnavailable, as this does, when the node is gone or stays silent for REPLY_SECONDS. Whoever no longer
        wants the reply cancels it.
        """
        if self._stream is None or self._failure is not None:
            raise NodeUnavailable(self.node, self._failure or f"Node {self.node} is not connected.")
        number = self.peer.next_id
        self.peer.next_id += ID_STEP
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        self._pending[number] = _Pending(future, monotonic(), nbytes, chained)
        self.peer.others = len(self._pending)
        future.add_done_callback(partial(self._settled, number))
        if later:
            loop.call_later(later, self._put, number, pieces)
        else:
            self._put(number, pieces)
        return future

    @property
    def flights(self) -> Flying | None:
        """Who gets the replies to requests of flights."""
        return self._flights

    @flights.setter
    def flights(self, flights: Flying) -> None:
        self._flights = flights
        self._landing.flights = flights.handle

    patience = None, 0  # see Taker: who asks waits for answers itself

    def ready(self) -> bool:
        """See Taker."""
        return self._flights is not None

    def took(self, messages: int) -> None:
        """See Taker."""
        if messages and self._flights is not None:
            self._flights.arrived()
            if self._line:
                self._write()

    def send_flight(self, where: int, size: int, taken: int) -> None:
        """Sends what is left of a flight's request, which lies at an address, when the outlet has said `taken`.

        `flights` gets the reply, or hears that the node is gone.
        """
        if self._stream is None or self._failure is not None:
            self._lose_flights(self._failure or f"Node {self.node} is not connected.")
        else:
            self._stream.sent_natively(where, size, taken)

    def settle(self) -> None:
        """Credits what was read natively."""
        if self._stream is not None:
            self._stream.settle()

    def go_on(self) -> None:
        """Takes what was read natively and was not as usual."""
        if self._stream is not None:
            self._stream.go_on()

    async def close(self, sentence: str) -> None:
        """Ends the stream; requests in flight fail with `sentence`."""
        self._fail(sentence)
        if self._watching is not None:
            self._watching.cancel()
        if self._stream is not None:
            self._stream.cancel()
        await self._channel.close()

    def _take(self, message: Buffer) -> bool:
        """A reply has come."""
        flights = self._flights
        assert self._stream is not None
        if flights is not None and flights.take(self, message, self._stream.times):
            if self._line:
                self._write()
            return True
        try:
            reply = parse_reply(message)
        except DecodeError:
            self._give_up(f"Node {self.node} sends what is no reply; it is asked again on a new connection.")
            return True
        head, values = reply
        pending = self._pending.get(head.id)
        if pending is None:
            if not (flights is not None and flights.take_strange(self, reply)) and not self._was_sent(head.id):
                self._give_up(
                    f"Node {self.node} answered a request that nobody has sent; it is asked again on a new "
                    "connection."
                )
        elif not pending.reply.done():  # else: its request was cancelled
            pending.reply.set_result(reply)
            # Others would share the link, and the time would say nothing.
            if len(self._pending) + self.peer.flying == 1 and not pending.chained:
                seconds = monotonic() - pending.sent_at - head.compute_ns / 1e9
                self.speed.note(max(pending.nbytes, len(values)), pending.nbytes + len(values), seconds)
        return True

    def _give_up(self, sentence: str) -> None:
        """The node sends nonsense: nothing more is read of it."""
        self._fail(sentence)
        if self._stream is not None:
            self._stream.cancel()

    def _ended(self) -> None:
        assert self._stream is not None
        failure = self._stream.failure
        if isinstance(failure, grpc.aio.AioRpcError):
            detail = (failure.details() or failure.code().name)[:512]
            self._fail(f"Node {self.node} is unavailable ({detail}); the request can be sent again once it is back.")
        self._fail(f"Node {self.node} ended the connection; the request can be sent again once it is back.")

    def _was_sent(self, request_id: int) -> bool:
        """Whether a request of this id was ever on this link, given up since or not."""
        return request_id < self.peer.next_id and request_id % ID_STEP == FIRST_ID

    def _put(self, number: int, pieces: tuple[Buffer, ...]) -> None:
        """A request is in line, unless it was given up meanwhile."""
        pending = self._pending.get(number)
        if pending is not None and self._failure is None:
            pending.sent_at = monotonic()  # a timer's turn may come late
            self._line.append((number, (*pieces, id_piece(number))))
            self._write()

    def _write(self) -> None:
        """Puts the requests in line on the stream, as many as it takes."""
        assert self._stream is not None
        while self._line and len(self._on_stream) + self.peer.flying < MAX_IN_FLIGHT:
            number, pieces = self._line.popleft()
            if number in self._pending:  # else: cancelled while it was in line
                self._on_stream.add(number)
                self._stream.send(pieces)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = monotonic()
            if any(pending.sent_at + REPLY_SECONDS < now for pending in self._pending.values()):
                self._fail(
                    f"Node {self.node} did not answer within {REPLY_SECONDS:.0f} s; it is taken for lost until it "
                    "joins again."
                )
                return

    def _settled(self, request_id: int, _: object) -> None:
        self._pending.pop(request_id, None)
        self.peer.others = len(self._pending)
        self._on_stream.discard(request_id)
        if self._line:
            self._write()

    def _fail(self, sentence: str) -> None:
        if self._failure is not None:
            return
        self._failure = sentence
        self.peer.outlet, self.peer.inlet = NativeOutlet(), None
        self._line.clear()
        for pending in list(self._pending.values()):
            if not pending.reply.done():
                pending.reply.set_exception(NodeUnavailable(self.node, sentence))
        self._lose_flights(sentence)
        self._on_close()

    def _lose_flights(self, sentence: str) -> None:
        if self._flights is not None:
            self._flights.lost(self, NodeUnavailable(self.node, sentence))


def probe(tokens: int) -> tuple[tuple[Buffer, ...], int]:
    """A request of so many tokens, 4 KiB each, that a node refuses at once: it asks for nothing, of no epoch.

    As `Link.send` takes it.
    """
    # Offsets of nothing: four bytes a token, and four.
    request = pb.ComputeRequest(layer=MAX_LAYER, reduction=pb.REDUCTION_PARTIAL_SUM, offsets=bytes(4 * tokens + 4))
    states = write_head(request, torch.zeros(tokens, 1024))
    return (head_bytes(request, len(states)), states), len(states)
