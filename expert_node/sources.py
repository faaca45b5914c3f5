"""Where a node fetches experts from: the coordinator, and other nodes."""

from collections.abc import Callable
from typing import NamedTuple

from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import MAX_CHUNK_BYTES
from moehive.proto.channel import COORDINATOR_NAME, Identity, node_dns_name
from moehive.proto.chunks import MOST_BYTES
from moehive.proto.handshake import metadata
from moehive.proto.wire.channel import Call, Channel
from moehive.proto.wire.methods import FETCH_SLICE, FETCH_SLICE_OF_PEER

MAX_REPLY_BYTES = 2 * MAX_CHUNK_BYTES
WINDOW_BYTES = 3 * MOST_BYTES  # of a stream, unread: 10 Gbit/s with a round trip of 1.2 ms, and there are several


class Peer(NamedTuple):
    """Another node of the cluster."""

    name: str
    address: str  # host:port

    @property
    def dns_name(self) -> str:
        """What its certificate says."""
        return node_dns_name(self.name)


class SourceChannels:
    """Channels that experts come through, opened as they are needed; use it on one event loop."""

    def __init__(self, identity: Callable[[], Identity], coordinator: str) -> None:
        """`coordinator`: its address, host:port."""
        self._identity = identity
        self._coordinator = coordinator
        self._open: dict[Peer | None, Channel] = {}

    def fetch_slice(self, peer: Peer | None, request: pb.SliceRequest) -> Call:
        """FetchSlice of a node, or of the coordinator, whose replies are for proto/chunks.py to read.

        The call ends in UNAVAILABLE when the other side is not that node of this cluster.
        """
        method = FETCH_SLICE if peer is None else FETCH_SLICE_OF_PEER
        call: Call = self._channel(peer).unary_stream(method, pb.SliceRequest.SerializeToString)(request, metadata())
        return call

    def _channel(self, peer: Peer | None) -> Channel:
        channel = self._open.get(peer)
        if channel is None or channel.over:
            address, name = (self._coordinator, COORDINATOR_NAME) if peer is None else (peer.address, peer.dns_name)
            channel = self._open[peer] = Channel(address, self._identity(), name, MAX_REPLY_BYTES, WINDOW_BYTES)
        return channel

    async def close(self) -> None:
        """Ends every call."""
        while self._open:
            await self._open.popitem()[1].close()
