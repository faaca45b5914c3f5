"""Brings a slice into the store: from the disk cache where it is whole, else from other machines.

Each expert is checked and written to the cache in one pass, and mapped from there: memory holds it once.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from moehive.kernels.geometry import ExpertId, GeometryError, Manifest
from moehive.kernels.manifest import from_bytes
from moehive.kernels.ops import load_expert
from moehive.proto import cluster_pb2 as pb

from .cache import DiskCache
from .concurrency import all_of, in_thread
from .download import Download, SliceError
from .footprint import give_back
from .store import ExpertStore
from .uplink import Uplink

log = logging.getLogger(__name__)

READERS = 4  # experts that are read from the cache at once: a disk is fastest with several requests to answer


@dataclass(frozen=True, slots=True)
class Assignment:
    """The experts that the node shall hold from an epoch on."""

    epoch: int
    manifest: Manifest
    experts: tuple[ExpertId, ...]  # ascending
    in_ram: frozenset[ExpertId] = frozenset()  # of those: stay in RAM
    in_vram: frozenset[ExpertId] = frozenset()  # of those: stay in the GPU's memory

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
        in_ram = frozenset(ExpertId(layer.layer, number) for layer in message.layers for number in layer.in_ram)
        in_vram = frozenset(ExpertId(layer.layer, number) for layer in message.layers for number in layer.in_vram)
        return cls(message.epoch, manifest, experts, in_ram, in_vram)


Progress = Callable[[int, int], None]  # bytes done, bytes in all


class SliceLoader:
    """Loads assignments, one at a time; use it on one event loop."""

    def __init__(self, store: ExpertStore, cache_root: Path, uplink: Uplink) -> None:
        self._store = store
        self._cache_root = cache_root
        self._uplink = uplink
        self._cache: DiskCache | None = None  # of the latest load
        self._coming: set[ExpertId] = set()  # experts of the load in hand that are not here yet
        self._arrival = asyncio.Event()  # of the next expert, or the end of the load

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
        cache = self._cache = await in_thread(DiskCache, self._cache_root, manifest.fingerprint, self._cache)
        self._coming.update(missing)
        first = not self._store.experts_held  # else requests wait for the pages to come back
        if first:
            await in_thread(give_back)  # a large process has many pages to be looked at
        try:
            cached = [expert for expert in missing if expert in cache]
            if cached:
                log.info("Reading %d experts from the disk cache and checking them.", len(cached))
                await self._read(manifest, cache, cached, lambda done: progress(total - left + done, total))
            missing = [expert for expert in missing if expert in self._coming]
            if missing:
                left = sum(manifest.nbytes(expert) for expert in missing)
                log.info("Fetching %d experts, %.1f MB.", len(missing), left / 1e6)
                await in_thread(_make_room, cache, manifest, missing)
                download = Download(
                    manifest,
                    cache,
                    self._uplink,
                    lambda expert, blob: self._add(manifest, expert, blob),
                    lambda done: progress(total - left + done, total),
                )
                await download.run(missing)
        finally:
            self._coming.clear()
            self._wake()
        if first:
            await in_thread(give_back)

    async def file_of(self, fingerprint: str, expert: ExpertId) -> Path | None:
        """The checked file of an expert, waited for while the expert is on its way; None when it is not."""
        while (cache := self._cache) is not None and cache.fingerprint == fingerprint:
            path = cache.checked(expert)
            if path is not None:
                return path
            if expert not in self._coming:
                break
            await self._arrival.wait()
        return None

    async def _read(
        self, manifest: Manifest, cache: DiskCache, experts: Iterable[ExpertId], progress: Callable[[int], None]
    ) -> None:
        """Adds what the cache has whole."""
        queue = iter(experts)
        done = 0

        async def reader() -> None:
            nonlocal done
            for expert in queue:  # all readers take from one
                nbytes = manifest.nbytes(expert)
                blob = await in_thread(cache.load, expert, nbytes)
                if blob is not None:
                    self._add(manifest, expert, blob)
                    done += nbytes
                    progress(done)

        await all_of(reader() for _ in range(READERS))

    def _add(self, manifest: Manifest, expert: ExpertId, blob: torch.Tensor) -> None:
        path = self._cache.checked(expert) if self._cache is not None else None
        self._store.add(expert, load_expert(manifest.layers[expert.layer].spec_of(expert.expert), blob), path)
        self._coming.discard(expert)
        self._wake()

    def _wake(self) -> None:
        self._arrival.set()
        self._arrival = asyncio.Event()


def _make_room(cache: DiskCache, manifest: Manifest, experts: list[ExpertId]) -> None:
    total = sum(manifest.nbytes(expert) for expert in experts)
    cache.make_room(total - sum(cache.part_bytes(expert, manifest.nbytes(expert)) for expert in experts))
