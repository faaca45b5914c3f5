"""Experts from node to node: the door for the others, and the channels to them.

Only nodes of the same cluster may ask, by their certificates; what they are given they check by the coordinator's
hashes. What is served are the files of the disk cache whose content this node has checked.
"""

import asyncio
import mmap
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grpc
import grpc.aio

from moehive.kernels.geometry import ExpertId
from moehive.proto import cluster_pb2 as pb
from moehive.proto import cluster_pb2_grpc
from moehive.proto.bounds import MAX_CHUNK_BYTES, BoundsError, check_slice_request
from moehive.proto.channel import COORDINATOR_NAME, Identity, node_dns_name, open_channel, peer_names
from moehive.proto.chunks import make_chunks, spans, worth_compressing
from moehive.proto.pacing import Pace
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.server import Context

MAX_STREAMS = 64  # that other nodes may have open here at once
WINDOW_BYTES = 1 << 20  # of one stream, unread: 10 Gbit/s with a round trip of 0.8 ms, and several streams
_AHEAD_BYTES = 4 * MAX_CHUNK_BYTES  # made in one go by a thread
NODE_SUFFIX = node_dns_name("")

Find: TypeAlias = Callable[[str, ExpertId], Awaitable[Path | None]]  # see SliceLoader.file_of


class Peer(NamedTuple):
    """Another node of the cluster."""

    name: str
    address: str  # host:port


class SourceChannels:
    """Channels that experts come through, opened as they are needed; use it on one event loop."""

    def __init__(self, identity: Callable[[], Identity], coordinator: str) -> None:
        """`coordinator`: its address, host:port."""
        self._identity = identity
        self._coordinator = coordinator
        self._up: grpc.aio.Channel | None = None
        self._peers: dict[Peer, Channel] = {}

    def coordinator(self) -> cluster_pb2_grpc.ClusterStub:
        """The coordinator, on another channel than the control stream's."""
        return cluster_pb2_grpc.ClusterStub(self._coordinators())

    def fetch_slice(self, peer: Peer | None) -> Any:
        """The rpc FetchSlice of a node, or of the coordinator, whose replies are for proto/chunks.py to read.

        Calls end in UNAVAILABLE when the other side is not that node of this cluster.
        """
        channel = self._coordinators() if peer is None else self._peer(peer)
        service = pb.DESCRIPTOR.services_by_name["Cluster" if peer is None else "Peers"]
        name = f"/{service.full_name}/FetchSlice"
        return channel.unary_stream(name, request_serializer=pb.SliceRequest.SerializeToString)

    def _coordinators(self) -> grpc.aio.Channel:
        if self._up is None:
            self._up = open_channel(self._coordinator, self._identity(), COORDINATOR_NAME, WINDOW_BYTES)
        return self._up

    def _peer(self, peer: Peer) -> Channel:
        if peer not in self._peers:
            self._peers[peer] = Channel(
                peer.address, self._identity(), node_dns_name(peer.name), 2 * MAX_CHUNK_BYTES, 4 * MAX_CHUNK_BYTES
            )
        return self._peers[peer]

    async def close(self) -> None:
        """Ends every call."""
        if self._up is not None:
            await self._up.close()
            self._up = None
        while self._peers:
            await self._peers.popitem()[1].close()


class PeerService(cluster_pb2_grpc.PeersServicer):
    """Peers.FetchSlice."""

    def __init__(self, find: Find, pace: Pace) -> None:
        """`pace` bounds what the copies take of this node's link."""
        self._find = find
        self._pace = pace
        self._streams = 0

    async def FetchSlice(self, request: pb.SliceRequest, context: Context) -> AsyncIterator[bytes]:
        """The experts asked for, in that order, as serialized SliceChunks; waits for one that is on its way here."""
        if not any(name.endswith(NODE_SUFFIX) for name in peer_names(context)):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "Only nodes of this cluster may ask for experts.")
        check_slice_request(request)
        if self._streams >= MAX_STREAMS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many nodes fetch from this one now.")
        self._streams += 1
        try:
            for want in request.experts:
                path = await self._find(request.fingerprint, ExpertId(want.layer, want.expert))
                if path is None:
                    what = f"expert {want.expert} of layer {want.layer}"
                    await context.abort(grpc.StatusCode.NOT_FOUND, f"This node does not have {what}.")
                else:
                    async for chunk in self._pace.chunks(_file_chunks(path, want, request.zstd)):
                        yield chunk
        finally:
            self._streams -= 1


async def _file_chunks(path: Path, want: pb.ExpertWanted, may_compress: bool) -> AsyncGenerator[bytes]:
    digest = bytes.fromhex(path.name.split(".")[1])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        view = memoryview(data)
        try:
            if want.offset > len(view):
                raise BoundsError(f"Expert {want.expert} of layer {want.layer} has {len(view)} bytes only.")
            zstd = may_compress and await asyncio.to_thread(worth_compressing, view)
            expert = (want.layer, want.expert)
            for span in spans(want.offset, len(view), _AHEAD_BYTES):
                for chunk, _ in await asyncio.to_thread(make_chunks, expert, view, span, digest, zstd):
                    yield chunk
        finally:
            view.release()
