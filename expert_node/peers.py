"""Experts from node to node: the door for the others.

Only nodes of the same cluster may ask, by their certificates; what they are given they check by the coordinator's
hashes. What is served are the files of the disk cache whose content this node has checked.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio

from moehive.kernels.geometry import ExpertId
from moehive.proto import cluster_pb2 as pb
from moehive.proto import cluster_pb2_grpc
from moehive.proto.bounds import BoundsError, check_slice_request
from moehive.proto.channel import node_dns_name, peer_names
from moehive.proto.chunks import Message, expert_chunks, worth_compressing
from moehive.proto.pacing import Pace
from moehive.proto.wire.server import Context

from .cache import mapped

MAX_STREAMS = 64  # that other nodes may have open here at once
NODE_SUFFIX = node_dns_name("")

Find: TypeAlias = Callable[[str, ExpertId], Awaitable[Path | None]]  # see SliceLoader.file_of


class PeerService(cluster_pb2_grpc.PeersServicer):
    """Peers.FetchSlice."""

    def __init__(self, find: Find, pace: Pace) -> None:
        """`pace` bounds what the copies take of this node's link."""
        self._find = find
        self._pace = pace
        self._streams = 0

    async def FetchSlice(self, request: pb.SliceRequest, context: Context) -> AsyncIterator[Message]:
        """The experts asked for, in that order, as serialized SliceChunks; waits for one that is on its way here."""
        if not any(name.endswith(NODE_SUFFIX) for name in peer_names(context)):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "Only nodes of this cluster may ask for experts.")
        check_slice_request(request)
        if self._streams >= MAX_STREAMS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many nodes fetch from this one now.")
        self._streams += 1
        try:
            async for chunk in self._pace.chunks(self._experts(request, context), context.caller.host):
                yield chunk
        finally:
            self._streams -= 1

    async def _experts(self, request: pb.SliceRequest, context: Context) -> AsyncGenerator[Message]:
        for want in request.experts:
            path = await self._find(request.fingerprint, ExpertId(want.layer, want.expert))
            if path is None:
                what = f"expert {want.expert} of layer {want.layer}"
                await context.abort(grpc.StatusCode.NOT_FOUND, f"This node does not have {what}.")
            else:
                async for chunk in _file_chunks(path, want, request.zstd):
                    yield chunk


async def _file_chunks(path: Path, want: pb.ExpertWanted, may_compress: bool) -> AsyncGenerator[Message]:
    digest = bytes.fromhex(path.name.split(".")[1])
    data, zstd = await asyncio.to_thread(_read, path, may_compress)
    if want.offset > len(data):
        raise BoundsError(f"Expert {want.expert} of layer {want.layer} has {len(data)} bytes only.")
    async for chunk in expert_chunks((want.layer, want.expert), data, want.offset, digest, zstd):
        yield chunk


def _read(path: Path, may_compress: bool) -> tuple[memoryview, bool]:
    """The file's bytes, in memory by now, and whether to compress them."""
    data = memoryview(mapped(path, path.stat().st_size).numpy())  # type: ignore[arg-type]
    return data, may_compress and worth_compressing(data)
