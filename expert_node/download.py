"""Fetches experts that this machine does not have: several streams at once, from other nodes or the coordinator.

The coordinator says for each batch where to ask. A cut is resumed at the byte where it happened. Nothing is used
before its hash is found right: what the coordinator sends carries it, and for what another node gives the
coordinator is asked. A node that gives wrong bytes is reported to it, and whoever fails is not asked again.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
import grpc.aio
import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import MAX_FAULTS, BoundsError, check_hashes, check_located
from moehive.proto.chunks import Chunk, read_chunk

from .appending import Appending
from .backoff import Backoff
from .cache import DiskCache, PartFile
from .concurrency import all_of, in_thread
from .sources import Peer, SourceChannels
from .types import NodeError
from .uplink import Uplink, is_loopback

log = logging.getLogger(__name__)

STREAMS = 3  # batches at once: while one is located, opened or checked, the others fill the link
BATCH_BYTES = 32 << 20  # a quarter of a second at 1 Gbit/s
BATCH_EXPERTS = 256
CHUNK_SECONDS = 60.0  # a coordinator that is silent for longer is asked again
PEER_SECONDS = 20.0  # a node that is silent for longer is left for another source
BAD_ANSWERS = 3  # of the coordinator in a row, before the slice is given up

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

Arrived = Callable[[ExpertId, torch.Tensor], None]  # the expert, and its bytes mapped, uint8 [nbytes]


class BadAnswer(NodeError):
    """The other side sent something that was not asked for."""


class SliceError(NodeError):
    """The slice cannot be had."""


class Download:
    """One slice's missing experts; `run` once."""

    def __init__(
        self,
        manifest: Manifest,
        cache: DiskCache,
        uplink: Uplink,
        arrived: Arrived,
        progress: Callable[[int], None],
    ) -> None:
        """`arrived` is called for each checked expert, `progress` with the bytes that are here by now."""
        self._manifest = manifest
        self._cache = cache
        self._uplink = uplink
        self._arrived = arrived
        self._progress = progress
        self._sources = SourceChannels(uplink.identity, uplink.address)
        self._todo: deque[ExpertId] = deque()
        self._here: dict[ExpertId, int] = {}  # bytes of each expert
        self._bytes = 0  # of all
        self._had: set[ExpertId] = set()
        self._avoid: set[str] = set()  # nodes that failed
        self._faults: list[tuple[str, ExpertId]] = []  # yet to be reported
        self._bad_answers = 0

    async def run(self, experts: Sequence[ExpertId]) -> None:
        """Returns when all are had; may be cancelled. Raises SliceError, CacheError."""
        self._todo.extend(experts)
        try:
            await all_of(self._work() for _ in range(STREAMS))
        finally:
            await self._sources.close()

    async def _work(self) -> None:
        """Fetches batch after batch; what could not be had goes back to the front."""
        backoff = Backoff(first=0.2, longest=10.0)
        while self._todo:
            batch = self._take()
            before = self._bytes
            await self._fetch(batch)
            left = [expert for expert in batch if expert not in self._had]
            if self._bytes > before:
                backoff.reset()
            if left:
                self._todo.extendleft(reversed(left))
                await backoff.wait()

    def _take(self) -> list[ExpertId]:
        batch: list[ExpertId] = []
        nbytes = 0
        while self._todo and len(batch) < BATCH_EXPERTS:
            nbytes += self._manifest.nbytes(self._todo[0])
            if batch and nbytes > BATCH_BYTES:
                break
            batch.append(self._todo.popleft())
        return batch

    async def _fetch(self, batch: list[ExpertId]) -> None:
        """Tries once to get a batch. Raises SliceError, CacheError."""
        try:
            sources = await self._locate(batch)
            groups: dict[Peer | None, list[ExpertId]] = {}
            for expert, source in zip(batch, sources, strict=True):
                groups.setdefault(source, []).append(expert)
            await all_of(
                self._from_coordinator(experts) if peer is None else self._from_peer(peer, experts)
                for peer, experts in groups.items()
            )
        except grpc.aio.AioRpcError as error:
            if error.code() in _FINAL:
                raise SliceError(f"The coordinator refuses the slice: {error.details()}") from error
            log.warning("The slice was cut (%s); asking again.", error.details() or error.code().name)
        except TimeoutError:
            log.warning("The coordinator sent nothing for %.0f s; asking again.", CHUNK_SECONDS)
        except (BadAnswer, BoundsError) as error:
            self._bad_answers += 1
            if self._bad_answers == BAD_ANSWERS:
                raise SliceError(f"{error} It did so {BAD_ANSWERS} times.") from error
            log.warning("%s Asking again.", error)

    async def _locate(self, batch: list[ExpertId]) -> list[Peer | None]:
        """Where to ask for each expert; None: the coordinator. Raises AioRpcError, TimeoutError, BoundsError."""
        faults, self._faults = self._faults[:MAX_FAULTS], self._faults[MAX_FAULTS:]
        request = pb.LocateRequest(fingerprint=self._manifest.fingerprint, avoid=sorted(self._avoid))
        for layer, expert in batch:
            request.experts.add(layer=layer, expert=expert)
        for name, (layer, expert) in faults:
            request.faults.add(node_name=name, layer=layer, expert=expert)
        reply = await self._uplink.locate(request)
        check_located(reply, len(batch))
        peers = [None, *(Peer(peer.node_name, peer.address) for peer in reply.peers)]
        return [peers[number] for number in reply.sources]

    async def _from_coordinator(self, experts: list[ExpertId]) -> None:
        async for expert, part, digest in self._stream(None, experts, CHUNK_SECONDS):
            if part.digest != digest:
                self._drop(expert, part)
                raise BadAnswer(f"The bytes of {_words(expert)} do not have the hash that the coordinator names.")
            await self._keep(expert, part)
            self._bad_answers = 0

    async def _from_peer(self, peer: Peer, experts: list[ExpertId]) -> None:
        """Gets what it can; a node that fails is avoided from here on. Raises what the coordinator's call raises."""
        whole: list[tuple[ExpertId, PartFile]] = []
        try:
            async for expert, part, _ in self._stream(peer, experts, PEER_SECONDS):
                whole.append((expert, part))
        except grpc.aio.AioRpcError as error:
            self._leave(peer, error.details() or error.code().name)
        except TimeoutError:
            self._leave(peer, f"it sent nothing for {PEER_SECONDS:.0f} s")
        except (BadAnswer, BoundsError) as error:
            self._leave(peer, str(error))
        if not whole:
            return
        request = pb.HashRequest(fingerprint=self._manifest.fingerprint)
        for (layer, number), _ in whole:
            request.experts.add(layer=layer, expert=number)
        reply = await self._uplink.hash_experts(request)
        check_hashes(reply, len(whole))
        for (expert, part), digest in zip(whole, reply.digests, strict=True):
            if part.digest == digest:
                await self._keep(expert, part)
                continue
            self._drop(expert, part)
            if part.resumed:  # the first bytes may have been another's
                continue
            self._leave(peer, f"it gave wrong bytes of {_words(expert)}")
            self._faults.append((peer.name, expert))

    async def _stream(
        self, peer: Peer | None, experts: list[ExpertId], silence: float
    ) -> AsyncIterator[tuple[ExpertId, PartFile, bytes]]:
        """One FetchSlice: yields each expert whose bytes are all here, unchecked, and the hash that came with it.

        `peer`: who is asked; None: the coordinator. `silence`: seconds without a chunk after which TimeoutError is
        raised. Also raises AioRpcError, BadAnswer, BoundsError and CacheError.
        """
        offsets = await in_thread(self._part_bytes, experts)
        address = self._uplink.address if peer is None else peer.address
        request = pb.SliceRequest(fingerprint=self._manifest.fingerprint, zstd=not is_loopback(address))
        for (layer, number), offset in zip(experts, offsets, strict=True):
            request.experts.add(layer=layer, expert=number, offset=offset)
        call = self._sources.fetch_slice(peer, request)
        try:
            for expert in experts:
                nbytes = self._manifest.nbytes(expert)
                part = await in_thread(self._cache.part, expert, nbytes)
                appending = Appending(part)
                try:
                    arrived = part.offset
                    self._note(expert, arrived)
                    while arrived < nbytes:
                        async with asyncio.timeout(silence):
                            message = await call.read()
                        if message is grpc.aio.EOF:
                            raise BadAnswer("The slice ended before its last expert.")
                        chunk = read_chunk(message)
                        arrived += _bytes_in(chunk, expert, arrived, nbytes)
                        await appending.add(chunk)
                        self._note(expert, part.offset)
                    await appending.finish()
                    self._note(expert, nbytes)
                except grpc.aio.AioRpcError:
                    await appending.finish()  # what has arrived need not be fetched again
                    raise
                finally:
                    await appending.stop()
                    part.close()
                yield expert, part, chunk.head.expert_digest
        finally:
            call.cancel()

    async def _keep(self, expert: ExpertId, part: PartFile) -> None:
        self._had.add(expert)
        self._arrived(expert, await in_thread(part.keep))

    def _drop(self, expert: ExpertId, part: PartFile) -> None:
        part.discard()
        self._note(expert, 0)

    def _leave(self, peer: Peer, why: str) -> None:
        log.warning("Node %s is not asked for experts any more (%s).", peer.name, why)
        self._avoid.add(peer.name)

    def _note(self, expert: ExpertId, nbytes: int) -> None:
        self._bytes += nbytes - self._here.get(expert, 0)
        self._here[expert] = nbytes
        self._progress(self._bytes)

    def _part_bytes(self, experts: list[ExpertId]) -> list[int]:
        return [self._cache.part_bytes(expert, self._manifest.nbytes(expert)) for expert in experts]


def _bytes_in(chunk: Chunk, expert: ExpertId, offset: int, nbytes: int) -> int:
    """How many of the expert's `nbytes` a chunk brings, `offset` of which are here. Raises BadAnswer."""
    head = chunk.head
    if (head.layer, head.expert, head.offset, head.total_bytes) != (*expert, offset, nbytes):
        raise BadAnswer(f"These are not the bytes of {_words(expert)} that were asked for.")
    brought = head.zstd_bytes or len(chunk.data)
    if not brought:
        raise BadAnswer(f"A chunk of {_words(expert)} is empty.")
    return brought


def _words(expert: ExpertId) -> str:
    return f"expert {expert.expert} of layer {expert.layer}"
