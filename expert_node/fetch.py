"""Brings a slice into the store: from the disk cache where it is whole, else from the coordinator.

Each expert is checked and written to the cache in one pass, and mapped from there: memory holds it once. A cut is
resumed at the byte where it happened, for as long as the assignment stands.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ParamSpec, TypeVar

import grpc
import grpc.aio
import torch

from moehive.kernels.geometry import ExpertId, GeometryError, Manifest
from moehive.kernels.manifest import from_bytes
from moehive.kernels.ops import ExpertWeights, load_expert
from moehive.proto import cluster_pb2 as pb
from moehive.proto import cluster_pb2_grpc
from moehive.proto.bounds import MAX_EXPERTS, BoundsError, check_chunk
from moehive.proto.handshake import metadata

from .backoff import Backoff
from .cache import DiskCache, PartFile
from .store import ExpertStore
from .types import NodeError

log = logging.getLogger(__name__)

CHUNK_SECONDS = 60.0  # a coordinator that is silent for longer is asked again
BAD_ANSWERS = 3  # in a row, before the slice is given up

# The coordinator's mind will not change by itself: say so instead of asking again at once.
_FINAL = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)


P = ParamSpec("P")
T = TypeVar("T")


class BadAnswer(NodeError):
    """The coordinator sent bytes that are not what was asked for."""


class SliceError(NodeError):
    """The slice cannot be had."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The experts that the node shall hold from an epoch on."""

    epoch: int
    manifest: Manifest
    experts: tuple[ExpertId, ...]  # ascending

    @classmethod
    def read(cls, message: pb.AssignSlice) -> "Assignment":
        """Of a directive that is within its bounds. Raises SliceError when it contradicts its own manifest."""
        try:
            manifest = from_bytes(message.manifest)
        except GeometryError as error:
            raise SliceError(str(error)) from error
        if any(a.layer >= b.layer for a, b in pairwise(message.layers)):
            raise SliceError("The assigned slice's layers must be ascending.")
        for layer in message.layers:
            there = manifest.layers[layer.layer].experts if layer.layer < len(manifest.layers) else 0
            if layer.experts and layer.experts[-1] >= there:
                raise SliceError(
                    f"The assigned slice names expert {layer.experts[-1]} of layer {layer.layer}: none such."
                )
        experts = tuple(ExpertId(layer.layer, number) for layer in message.layers for number in layer.experts)
        return cls(message.epoch, manifest, experts)


Progress = Callable[[int, int], None]  # bytes done, bytes in all


class SliceLoader:
    """Loads assignments, one at a time. `stub` is asked at each call, so a new channel is used at once."""

    def __init__(
        self, store: ExpertStore, cache_root: Path, stub: Callable[[], cluster_pb2_grpc.ClusterStub]
    ) -> None:
        self._store = store
        self._cache_root = cache_root
        self._stub = stub

    async def load(self, wanted: Assignment, keep: Collection[ExpertId], progress: Progress) -> None:
        """Returns once the store holds the whole assignment; other experts than `keep` may have to make room.

        May be cancelled; what is loaded by then stays. Raises NodeError with one sentence.
        """
        manifest = wanted.manifest
        total = sum(manifest.nbytes(expert) for expert in wanted.experts)
        self._store.use(manifest, wanted.epoch)
        missing = [expert for expert in wanted.experts if expert not in self._store]
        left = sum(manifest.nbytes(expert) for expert in missing)
        self._store.make_room(left, keep)
        progress(total - left, total)
        if not missing:
            return
        cache = await _in_thread(DiskCache, self._cache_root, manifest.fingerprint)
        cached = [expert for expert in missing if expert in cache]
        if cached:
            log.info("Reading %d experts from the disk cache and checking them.", len(cached))
        for expert in cached:
            weights = await _in_thread(_from_cache, cache, manifest, expert)
            if weights is not None:
                self._store.add(expert, weights)
                left -= manifest.nbytes(expert)
                progress(total - left, total)
        missing = [expert for expert in missing if expert not in self._store]
        if missing:
            log.info("Fetching %d experts, %.1f MB.", len(missing), left / 1e6)
            await _in_thread(_make_room, cache, manifest, missing)
            await self._fetch(manifest, cache, missing, lambda done: progress(total - left + done, total))

    async def _fetch(
        self, manifest: Manifest, cache: DiskCache, missing: list[ExpertId], progress: Callable[[int], None]
    ) -> None:
        backoff = Backoff(first=0.2, longest=10.0)
        bad_answers = 0
        done = 0  # bytes of the experts that are in the store
        while missing:
            try:
                async for expert, offset in self._call(manifest, cache, missing[:MAX_EXPERTS]):
                    if offset == manifest.nbytes(expert):
                        done += offset
                        offset = 0
                        bad_answers = 0
                    backoff.reset()
                    progress(done + offset)
            except grpc.aio.AioRpcError as error:
                if error.code() in _FINAL:
                    raise SliceError(f"The coordinator refuses the slice: {error.details()}") from error
                log.warning("The slice was cut (%s); asking again.", error.details() or error.code().name)
            except TimeoutError:
                log.warning("The coordinator sent nothing for %.0f s; asking again.", CHUNK_SECONDS)
            except BadAnswer as error:
                bad_answers += 1
                if bad_answers == BAD_ANSWERS:
                    raise SliceError(f"{error} It did so {BAD_ANSWERS} times.") from error
                log.warning("%s Asking again.", error)
            missing = [expert for expert in missing if expert not in self._store]
            if missing:
                await backoff.wait()

    async def _call(
        self, manifest: Manifest, cache: DiskCache, wanted: list[ExpertId]
    ) -> AsyncIterator[tuple[ExpertId, int]]:
        """One FetchSlice: yields each chunk's expert and how many bytes of it are here; whole ones are in the store.

        Raises AioRpcError, TimeoutError, BadAnswer and CacheError.
        """
        offsets = await _in_thread(_part_bytes, cache, manifest, wanted)
        request = pb.SliceRequest(fingerprint=manifest.fingerprint)
        for expert, offset in zip(wanted, offsets, strict=True):
            request.experts.add(layer=expert.layer, expert=expert.expert, offset=offset)
        call = self._stub().FetchSlice(request, metadata=metadata())
        try:
            for expert, offset in zip(wanted, offsets, strict=True):
                spec = manifest.layers[expert.layer].spec
                part = await _in_thread(cache.part, expert, spec.nbytes)
                try:
                    if part.offset != offset:
                        raise BadAnswer(
                            f"The half-written expert {expert.expert} of layer {expert.layer} has changed."
                        )
                    while part.offset < spec.nbytes:
                        chunk = await asyncio.wait_for(call.read(), CHUNK_SECONDS)
                        if chunk is grpc.aio.EOF:
                            raise BadAnswer("The coordinator ended the slice before the last expert.")
                        blob = await _in_thread(_take, part, expert, spec.nbytes, chunk)
                        if blob is not None:
                            self._store.add(expert, load_expert(spec, blob))
                        yield expert, part.offset
                finally:
                    part.close()
        finally:
            call.cancel()


async def _in_thread(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """As asyncio.to_thread, but ends only after the thread's work, so that no two ever write to one file."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **keywords))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def _take(part: PartFile, expert: ExpertId, nbytes: int, chunk: pb.SliceChunk) -> torch.Tensor | None:
    """Checks the next chunk and appends it; the last one makes the file final and returns the blob.

    Raises BadAnswer and CacheError.
    """
    who = f"expert {expert.expert} of layer {expert.layer}"
    if (chunk.layer, chunk.expert, chunk.offset, chunk.total_bytes) != (*expert, part.offset, nbytes):
        raise BadAnswer(f"The coordinator did not send the bytes of {who} that were asked for.")
    try:
        check_chunk(chunk)
    except BoundsError as error:
        raise BadAnswer(f"{error} It was one of {who}.") from error
    if not chunk.data:
        raise BadAnswer(f"The coordinator sent an empty chunk of {who}.")
    part.append(chunk.data)
    if part.offset == nbytes:
        if part.sha256 != chunk.expert_sha256.hex():
            part.discard()
            raise BadAnswer(f"The bytes of {who} do not have the hash that the coordinator names.")
        return part.keep()
    return None


def _from_cache(cache: DiskCache, manifest: Manifest, expert: ExpertId) -> ExpertWeights | None:
    spec = manifest.layers[expert.layer].spec
    blob = cache.load(expert, spec.nbytes)
    return None if blob is None else load_expert(spec, blob)


def _part_bytes(cache: DiskCache, manifest: Manifest, experts: list[ExpertId]) -> list[int]:
    return [cache.part_bytes(expert, manifest.nbytes(expert)) for expert in experts]


def _make_room(cache: DiskCache, manifest: Manifest, experts: list[ExpertId]) -> None:
    total = sum(manifest.nbytes(expert) for expert in experts)
    cache.make_room(total - sum(_part_bytes(cache, manifest, experts)))
