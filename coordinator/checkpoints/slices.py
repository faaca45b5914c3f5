"""Sends experts to nodes: each expert's blob in hashed chunks, read from the checkpoint when it is asked for.

Never more than a few experts are in memory, whatever the number of nodes: a stream holds one blob at a time, and
all streams together at most what BLOB_BYTES allows. gRPC's flow control holds a stream back whose node is slow.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import MAX_CHUNK_BYTES, BoundsError, check_slice_request

from ..types import CoordinatorError

if TYPE_CHECKING:
    import torch

BLOB_BYTES = 256 << 20  # of blobs in memory, all streams together; two are always allowed
MAX_STREAMS = 16  # that send at once


class SliceMismatch(CoordinatorError):
    """The node asks for the experts of another model."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes [start, end) of a blob and their SHA-256."""

    start: int
    end: int
    sha256: bytes


class SliceSource:
    """Streams slices of one model. `expert_blob` reads one expert, uint8 [nbytes]; it is called in threads."""

    def __init__(self, manifest: Manifest, expert_blob: "Callable[[ExpertId], torch.Tensor]") -> None:
        self._manifest = manifest
        self._expert_blob = expert_blob
        largest = max(layer.spec.nbytes for layer in manifest.layers)
        self._slots = asyncio.Semaphore(max(2, min(MAX_STREAMS, BLOB_BYTES // largest)))

    async def stream(self, request: pb.SliceRequest) -> AsyncGenerator[pb.SliceChunk]:
        """The experts asked for, in that order, each from its offset on.

        An expert of which the node has all bytes already is answered by one empty chunk that carries its hash.
        Raises BoundsError, SliceMismatch, and what reading the checkpoint raises.
        """
        check_slice_request(request)
        if request.fingerprint != self._manifest.fingerprint:
            raise SliceMismatch(
                f"The node asks for model {request.fingerprint[:12]}…, this coordinator serves "
                f"{self._manifest.name} ({self._manifest.fingerprint[:12]}…); wait for the next slice."
            )
        wanted = [(ExpertId(want.layer, want.expert), want.offset) for want in request.experts]
        for expert, offset in wanted:
            self._check(expert, offset)
        for expert, offset in wanted:
            async with self._slots:
                blob, digest, pieces = await asyncio.to_thread(self._read, expert, offset)
                for piece in pieces:
                    yield pb.SliceChunk(
                        layer=expert.layer,
                        expert=expert.expert,
                        offset=piece.start,
                        total_bytes=len(blob),
                        data=bytes(blob[piece.start : piece.end]),
                        sha256=piece.sha256,
                        expert_sha256=digest if piece.end == len(blob) else b"",
                    )

    def _check(self, expert: ExpertId, offset: int) -> None:
        layers = self._manifest.layers
        if expert.layer >= len(layers) or expert.expert >= layers[expert.layer].experts:
            raise BoundsError(f"The model has no expert {expert.expert} in MoE layer {expert.layer}.")
        nbytes = self._manifest.nbytes(expert)
        if offset > nbytes:
            raise BoundsError(f"Expert {expert.expert} of layer {expert.layer} has {nbytes} bytes, not {offset}.")

    def _read(self, expert: ExpertId, offset: int) -> tuple[memoryview, bytes, list[_Piece]]:
        """The blob, its SHA-256 and the pieces from `offset` on; in a thread, hashing releases the GIL."""
        blob = memoryview(self._expert_blob(expert).numpy())  # type: ignore[arg-type]
        whole = hashlib.sha256(blob)
        starts = range(offset, len(blob), MAX_CHUNK_BYTES) or range(offset, offset + 1)
        pieces = []
        for start in starts:
            end = min(start + MAX_CHUNK_BYTES, len(blob))
            pieces.append(_Piece(start, end, hashlib.sha256(blob[start:end]).digest()))
        return blob, whole.digest(), pieces
