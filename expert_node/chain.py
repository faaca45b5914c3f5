"""The way on from this node: streams to those that come after it in a chain, opened as they are needed.

Whom to ask, the request says; that it is that node of this cluster, its certificate does.
"""

import asyncio
from collections.abc import Callable

import grpc.aio
from google.protobuf.message import DecodeError

from moehive.proto.chain import check_chain_reply, next_request
from moehive.proto.channel import Identity, node_dns_name
from moehive.proto.handshake import metadata
from moehive.proto.tensors import Reply, Request, WireError, id_piece, parse_reply
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.messages import Buffer
from moehive.proto.wire.methods import PASS_ON

from .sources import Peer
from .types import NodeError

MAX_STREAMS = 32  # to other nodes at once; beyond it the oldest is closed
REPLY_SECONDS = 60.0  # a silent node must not hang this one; the coordinator has lost patience long before


class ChainBroken(NodeError):
    """The chain ended at `node`; the text is one sentence."""

    def __init__(self, node: str, sentence: str) -> None:
        super().__init__(sentence)
        self.node = node


class Onward:
    """Asks the next nodes; use it on one event loop."""

    def __init__(self, identity: Callable[[], Identity]) -> None:
        self._identity = identity
        self._streams: dict[Peer, _Stream] = {}

    async def ask(self, request: Request) -> Reply:
        """The reply of all nodes of `request`'s chain, which `check_chain` has checked. Raises ChainBroken."""
        nodes = request.head.chain
        peer = Peer(nodes[0].node_name, nodes[0].address)
        stream = self._streams.get(peer)
        if stream is None or stream.ended:
            await self._make_room(peer)
            stream = self._streams[peer] = _Stream(peer, self._identity())
        reply = await stream.ask(next_request(request))
        head = reply.head
        if head.HasField("refusal"):
            raise ChainBroken(head.refusal.node_name[:63] or peer.name, head.refusal.sentence[:1024])
        try:
            check_chain_reply(head, len(nodes) - 1)
        except WireError as error:
            raise ChainBroken(peer.name, f"Node {peer.name} answered something else than asked: {error}") from None
        return reply

    async def close(self) -> None:
        """Ends every stream."""
        while self._streams:
            await self._streams.popitem()[1].close()

    async def _make_room(self, peer: Peer) -> None:
        """Drops a stream to `peer` that has ended, and the oldest of too many."""
        gone = [self._streams.pop(peer)] if peer in self._streams else []
        if len(self._streams) >= MAX_STREAMS:
            gone.append(self._streams.pop(next(iter(self._streams))))
        for stream in gone:
            await stream.close()


class _Stream:
    """One stream, many requests in flight on it; whatever ends it ends them."""

    def __init__(self, peer: Peer, identity: Identity) -> None:
        self._peer = peer
        self._channel = Channel(peer.address, identity, node_dns_name(peer.name))
        self._opening = asyncio.create_task(self._channel.open(PASS_ON, metadata()))
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._last_id = 0
        self.ended = False

    async def ask(self, pieces: tuple[Buffer, ...]) -> Reply:
        """`pieces` are a request without its id.

        Raises ChainBroken when the node is gone or silent for REPLY_SECONDS.
        """
        self._last_id += 1
        number = self._last_id
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending[number] = reply
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                stream = await asyncio.shield(self._opening)
                if stream.on_message is None:
                    stream.on_message, stream.on_end = self._take, lambda: self._end(_why(stream.failure))
                stream.send((*pieces, id_piece(number)))
                await stream.drain()
                return await reply
        except TimeoutError:
            raise self._broken(f"did not answer within {REPLY_SECONDS:.0f} s") from None
        except grpc.aio.AioRpcError as error:
            self._end(_why(error))
            raise self._broken(_why(error)) from None
        finally:
            self._pending.pop(number, None)
            if reply.done() and not reply.cancelled():
                reply.exception()  # it was told already, where it was

    async def close(self) -> None:
        self._end("is not asked any more")
        self._opening.cancel()
        await self._channel.close()

    def _take(self, message: Buffer) -> bool:
        try:
            reply = parse_reply(message)
        except DecodeError:
            self._end("sends what is no reply")
            return True
        pending = self._pending.get(reply.head.id)
        if pending is not None and not pending.done():
            pending.set_result(reply)
        return True

    def _end(self, what: str) -> None:
        self.ended = True
        for pending in self._pending.values():
            if not pending.done():
                pending.set_exception(self._broken(what))

    def _broken(self, what: str) -> ChainBroken:
        return ChainBroken(self._peer.name, f"Node {self._peer.name} {what}, says the node before it in a chain.")


def _why(error: Exception | None) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"can't be asked ({(error.details() or error.code().name)[:512]})"
    return "ended the connection"
