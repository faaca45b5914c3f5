"""Sends experts to nodes, read from the checkpoint when they are asked for, in chunks.

Never more than a few experts are in memory, whatever the number of nodes: a stream holds one blob at a time, and
all streams together at most what BLOB_BYTES allows. Flow control holds a stream back whose node is slow.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import TYPE_CHECKING

from moehive.kernels.digest import digest_of
from moehive.kernels.geometry import ExpertId, Manifest
from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import BoundsError, check_hash_request, check_slice_request
from moehive.proto.chunks import Message, expert_chunks, worth_compressing

from ..types import CoordinatorError

if TYPE_CHECKING:
    import torch

BLOB_BYTES = 256 << 20  # of blobs in memory, all streams together; two are always allowed
MAX_STREAMS = 16  # that send at once


class SliceMismatch(CoordinatorError):
    """The node asks for the experts of another model."""


class ExpertUnreadable(CoordinatorError):
    """An expert can't be had of the model's files, for example because they are damaged."""


class SliceSource:
    """Streams slices of one model, and knows what its experts hash to; use it on one event loop."""

    def __init__(
        self,
        manifest: Manifest,
        expert_blob: "Callable[[ExpertId], torch.Tensor]",
        known_hash: Callable[[ExpertId], bytes | None] = lambda _: None,
    ) -> None:
        """`expert_blob` reads one expert, uint8 [nbytes], in a thread; `known_hash` is its hash where stored."""
        self.bytes_sent = 0  # on the wire, of experts
        self._manifest = manifest
        self._expert_blob = expert_blob
        self._known_hash = known_hash
        self._hashes: dict[ExpertId, bytes] = {}  # of experts that were read once
        largest = max(layer.largest_bytes for layer in manifest.layers)
        self._slots = asyncio.Semaphore(max(2, min(MAX_STREAMS, BLOB_BYTES // largest)))

    async def stream(self, request: pb.SliceRequest) -> AsyncGenerator[Message]:
        """The experts asked for, in that order, each from its offset on, as serialized SliceChunks.

        An expert of which the node has all bytes already is answered by one empty chunk that carries its hash.
        Raises BoundsError, SliceMismatch, ExpertUnreadable.
        """
        check_slice_request(request)
        wanted = [(expert, want.offset) for expert, want in self.named(request.fingerprint, request.experts)]
        for expert, offset in wanted:
            async with self._slots:
                blob, digest, zstd = await asyncio.to_thread(self._read, expert, request.zstd)
                async for chunk in expert_chunks(expert, blob, offset, digest, zstd):
                    self.bytes_sent += len(chunk.data)
                    yield chunk

    async def hashes(self, request: pb.HashRequest) -> list[bytes]:
        """The hash of each expert asked for; those that nothing has read yet are read. Raises as `stream`."""
        check_hash_request(request)
        digests: list[bytes] = []
        for expert, _ in self.named(request.fingerprint, request.experts):
            digest = self._hashes.get(expert) or self._known_hash(expert)
            if digest is None:
                async with self._slots:
                    digest = (await asyncio.to_thread(self._read, expert, False))[1]
            digests.append(digest)
        return digests

    def named(self, fingerprint: str, wanted: Iterable[pb.ExpertWanted]) -> list[tuple[ExpertId, pb.ExpertWanted]]:
        """The experts that a node names, each with what it says of it. Raises BoundsError, SliceMismatch."""
        manifest = self._manifest
        if fingerprint != manifest.fingerprint:
            raise SliceMismatch(
                f"The node asks for model {fingerprint[:12]}…, this coordinator serves "
                f"{manifest.name} ({manifest.fingerprint[:12]}…); wait for the next slice."
            )
        named = [(ExpertId(want.layer, want.expert), want) for want in wanted]
        for (layer, number), want in named:
            if layer >= len(manifest.layers) or number >= manifest.layers[layer].experts:
                raise BoundsError(f"The model has no expert {number} in MoE layer {layer}.")
            nbytes = manifest.nbytes(ExpertId(layer, number))
            if want.offset > nbytes:
                raise BoundsError(f"Expert {number} of layer {layer} has {nbytes} bytes, not {want.offset}.")
        return named

    def _read(self, expert: ExpertId, may_compress: bool) -> tuple[memoryview, bytes, bool]:
        """The blob, its hash, and whether to compress it; in a thread, hashing releases the GIL.

        Raises ExpertUnreadable.
        """
        try:
            blob = memoryview(self._expert_blob(expert).numpy())  # type: ignore[arg-type]
        except CoordinatorError as error:
            raise ExpertUnreadable(str(error)) from error
        digest = self._hashes.get(expert) or self._known_hash(expert) or digest_of(blob)
        self._hashes[expert] = digest
        return blob, digest, may_compress and worth_compressing(blob)
