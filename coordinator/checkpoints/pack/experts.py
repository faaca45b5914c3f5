"""The experts of a pack, written by threads so that any kill or full disk only interrupts.

Workers read an expert, lay it out (in another format if one is wanted), hash it and write it to its place. The thread
that called collects what they did; every few megabytes it has the files written to the disk, and then enters the
experts in the journal. An expert counts when it is in the journal, never because its bytes are there.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from moehive.kernels.digest import digest_of
from moehive.kernels.geometry import ExpertId, ExpertSpec, GeometryError, Manifest

from ...types import CoordinatorError
from ...whole_file import sync_folder
from ..opening import ModelSource
from .journal import Journal
from .manifest import file_name, offsets

COMMIT_SECONDS = 1.0  # between two entries in the journal, at most about
_AHEAD = 8  # experts queued for each worker, so that none waits while the disk is

Progress = Callable[[int, int], None]  # bytes of experts done, and of all
Encode = Callable[[ExpertId, torch.Tensor], torch.Tensor]  # called in workers


def spec_of(manifest: Manifest, expert: ExpertId) -> ExpertSpec:
    """How one expert is laid out."""
    return manifest.layers[expert.layer].spec_of(expert.expert)


class Files:
    """The pack's files, open for writing at any place."""

    def __init__(self, folder: Path, target: Manifest, journal: Journal, stack: ExitStack) -> None:
        self._descriptors: list[int] = []
        self._offsets = [offsets(layer) for layer in target.layers]
        needed = [0] * len(target.layers)  # bytes that a file must have for what the journal says
        for expert in journal.finished:
            end = self._offsets[expert.layer][expert.expert] + target.nbytes(expert)
            needed[expert.layer] = max(needed[expert.layer], end)
        for number in range(len(target.layers)):
            path = folder / file_name(number)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, descriptor)
            if os.fstat(descriptor).st_size < needed[number]:
                raise CoordinatorError(f"{path} is not as it was left; delete {folder} and convert again.")
            self._descriptors.append(descriptor)
        sync_folder(folder)

    def finish(self) -> None:
        """Gives each file its full size: the last expert's page too."""
        for descriptor, size in zip(self._descriptors, self._offsets, strict=True):
            os.ftruncate(descriptor, size[-1])
            os.fsync(descriptor)

    def write(self, expert: ExpertId, blob: memoryview) -> None:
        offset = self._offsets[expert.layer][expert.expert]
        while blob:
            count = os.pwrite(self._descriptors[expert.layer], blob, offset)
            blob, offset = blob[count:], offset + count

    def sync(self, layers: set[int]) -> None:
        for layer in layers:
            os.fdatasync(self._descriptors[layer])


@dataclass(frozen=True, slots=True)
class Work:
    """What workers are given. `files`: None where the pack holds hashes alone; `commit_bytes`: see `convert`."""

    source: ModelSource
    target: Manifest
    files: Files | None
    journal: Journal
    commit_bytes: int
    encode: Encode

    def do(self, expert: ExpertId) -> tuple[ExpertId, bytes]:
        """One expert, in a worker: read, encode, hash, write."""
        blob = self.source.expert_blob(expert)
        if spec_of(self.source.manifest, expert) != spec_of(self.target, expert):
            try:
                blob = self.encode(expert, blob)
            except GeometryError as error:
                raise CoordinatorError(
                    f"Expert {expert.expert} of MoE layer {expert.layer} can't be converted: {error}"
                ) from error
        buffer: Any = blob.numpy()
        view = memoryview(buffer)
        digest = digest_of(view)
        if self.files is not None:
            self.files.write(expert, view)
        return expert, digest

    def commit(self, done: list[tuple[ExpertId, bytes]]) -> None:
        """Bytes first, then the entry that says so."""
        if done:
            if self.files is not None:
                self.files.sync({expert.layer for expert, _ in done})
            self.journal.append(done)


def write_experts(work: Work, workers: int, progress: Progress) -> None:
    """All experts that are not finished; whatever happens, what is finished is entered."""
    layers = work.target.layers
    left = (
        expert
        for number, layer in enumerate(layers)
        for expert in (ExpertId(number, e) for e in range(layer.experts))
        if expert not in work.journal.finished
    )
    total = work.target.total_bytes
    ready = sum(work.target.nbytes(expert) for expert in work.journal.finished)
    stopped = threading.Event()

    def do(expert: ExpertId) -> tuple[ExpertId, bytes] | None:
        return None if stopped.is_set() else work.do(expert)

    done: list[tuple[ExpertId, bytes]] = []
    uncommitted, last = 0, monotonic()
    with ThreadPoolExecutor(workers, "convert") as pool:
        running: set[Future[tuple[ExpertId, bytes] | None]] = set()
        try:
            progress(ready, total)
            exhausted = False
            while running or not exhausted:
                while not exhausted and len(running) < _AHEAD * workers:
                    expert = next(left, None)
                    exhausted = expert is None
                    if expert is not None:
                        running.add(pool.submit(do, expert))
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    running.remove(future)  # not before: the others that are done are entered when this one failed
                    assert result is not None
                    done.append(result)
                    size = work.target.nbytes(result[0])
                    ready, uncommitted = ready + size, uncommitted + size
                progress(ready, total)
                if uncommitted >= work.commit_bytes or monotonic() - last >= COMMIT_SECONDS:
                    done, committing = [], done
                    work.commit(committing)
                    uncommitted, last = 0, monotonic()
        finally:
            stopped.set()
            for future in wait(running).done:
                if future.exception() is None and (result := future.result()) is not None:
                    done.append(result)
            work.commit(done)
