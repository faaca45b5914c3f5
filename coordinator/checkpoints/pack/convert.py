"""`moehive convert`: a checkpoint into a pack, expert by expert, in a way that any kill or full disk only interrupts.

Workers read an expert, lay it out (in another format if one is wanted), hash it and write it to its place. The thread
that called collects what they did; every few megabytes it has the files written to the disk, and then enters the
experts in the journal. An expert counts when it is in the journal, never because its bytes are there.
"""

import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from moehive.kernels.digest import digest_of
from moehive.kernels.geometry import ExpertId, ExpertSpec, GeometryError, LayerGeometry, Manifest

from ...types import CoordinatorError
from ..opening import ModelSource, trunk_of
from .checkpoint import PackCheckpoint
from .encoding import check_encodable, check_format, reencode, respecified
from .journal import Journal
from .manifest import (
    NAME,
    PackManifest,
    content_fingerprint,
    file_name,
    identity_of,
    offsets,
    read_manifest,
    sync_folder,
    write_manifest,
)
from .matrices import Encode as EncodeMatrix
from .matrices import TrunkMatrix
from .source_trunk import hash_source
from .trunk import hash_trunk, write_trunk
from .unfinished import another_pack, check_way, finish, is_begun

KEEP = "keep"  # as a format: each tensor's own
COMMIT_BYTES = 64 << 20  # written between two entries in the journal, about
COMMIT_SECONDS = 1.0  # between two entries, at most about
_AHEAD = 8  # experts queued for each worker, so that none waits while the disk is

Progress = Callable[[int, int], None]  # bytes of experts done, and of all
Encode = Callable[[ExpertId, torch.Tensor], torch.Tensor]  # called in workers


@dataclass(frozen=True, slots=True)
class Chosen:
    """Formats expert by expert: the layers as they are to be, and what makes an expert's blob of the source's.

    `matrices` of the trunk get formats of their own; `encode_matrix` gives their blobs.
    """

    layers: tuple[LayerGeometry, ...]
    encode: Encode
    matrices: tuple[TrunkMatrix, ...] = ()
    encode_matrix: EncodeMatrix | None = None


Choose = Callable[[Path], Chosen]  # given the pack's folder, which is locked; it may keep what unfinished.py names


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did. `in_place`: nothing was copied; `resumed` experts were there already.

    `seconds`: 0 if the pack was whole before.
    """

    manifest: Manifest
    in_place: bool
    experts: int
    resumed: int
    expert_bytes: int  # of all experts, as nodes hold them
    trunk_bytes: int  # copied; 0 in place
    seconds: float


def convert(
    source: ModelSource,
    folder: Path,
    format: str | Chosen | Choose | None,
    workers: int,
    progress: Progress = lambda *_: None,
    commit_bytes: int = COMMIT_BYTES,
) -> Converted:
    """Makes the pack `folder` of `source`, or goes on where an earlier run was stopped.

    `format`: None serves a source in place whose weights are computed as they are stored, and copies another; "keep"
    copies in the formats of the source; else the projections of all experts are encoded in that format, or as was
    chosen for each, before or by a function. `workers`: threads, each with one expert in work. `commit_bytes`: after
    so many, what is finished is made to last. Raises CoordinatorError, one sentence; what was finished stays, also
    when the disk is full, and a second call goes on.
    """
    # Before there is a folder: what is wrong with a format makes none.
    wanted = None if callable(format) else wanted_pack(source, folder, format)
    try:
        with _owned(folder):
            check_way(folder, (folder / NAME).exists(), chosen=callable(format))
            if callable(format):
                wanted = wanted_pack(source, folder, format(folder))
            assert wanted is not None
            done = _whole(wanted)
            if done is not None:
                total = sum(layer.experts for layer in wanted.target.layers)
                return Converted(done.manifest, wanted.in_place, total, total, wanted.target.total_bytes, 0, 0.0)
            return _convert(wanted, workers, progress, commit_bytes)
    except OSError as error:
        raise CoordinatorError(
            f"{folder} can't be written ({error.strerror}); what is finished stays, so free some space, or name "
            "another directory, and run the same command again."
        ) from error


@dataclass(frozen=True, slots=True)
class Wanted:
    """A conversion: of what, where, into what, and its identity (`identity_of`)."""

    source: ModelSource
    folder: Path
    target: Manifest
    identity: bytes
    in_place: bool
    encode: Encode
    matrices: tuple[TrunkMatrix, ...]
    encode_matrix: EncodeMatrix | None


def wanted_pack(source: ModelSource, folder: Path, format: str | Chosen | None) -> Wanted:
    """What `convert` would make. Raises CoordinatorError for a format that can't be made."""
    in_place = format is None and source.computed_as_stored and not isinstance(source, PackCheckpoint)
    target = _target(source.manifest, format)
    matrices, encode_matrix = _matrices(source, format)
    identity = identity_of(source.manifest, target, in_place, matrices)
    encode = format.encode if isinstance(format, Chosen) else partial(_reencode, source.manifest, target)
    return Wanted(source, folder, target, identity, in_place, encode, matrices, encode_matrix)


def _convert(wanted: Wanted, workers: int, progress: Progress, commit_bytes: int) -> Converted:
    source, folder, target, in_place = wanted.source, wanted.folder, wanted.target, wanted.in_place
    started = monotonic()
    with ExitStack() as stack:
        journal = Journal(folder, wanted.identity, target)
        stack.callback(journal.close)
        if not in_place:
            _check_space(folder, target)
        resumed = len(journal.finished)
        files = None if in_place else _Files(folder, target, journal, stack)
        _run(_Work(source, target, files, journal, commit_bytes, wanted.encode), workers, progress)
        hashes = tuple(
            b"".join(journal.finished[ExpertId(number, expert)] for expert in range(layer.experts))
            for number, layer in enumerate(target.layers)
        )
        if files is not None:
            files.finish()
            write_trunk(folder, trunk_of(source), wanted.matrices, wanted.encode_matrix)
        trunk = hash_source(trunk_of(source)) if in_place else hash_trunk(folder)
        pack = PackManifest(
            replace(target, fingerprint=content_fingerprint(target, hashes)),
            wanted.identity,
            hashes,
            source=str(source.path.resolve()) if in_place else "",
            source_fingerprint=source.manifest.fingerprint,
            trunk=trunk,
            matrices=wanted.matrices,
        )
        write_manifest(folder, pack)
        finish(folder)
    return Converted(
        pack.manifest,
        in_place,
        sum(layer.experts for layer in target.layers),
        resumed,
        target.total_bytes,
        0 if in_place else sum(part.nbytes for part in trunk),
        monotonic() - started,
    )


def _target(source: Manifest, format: str | Chosen | None) -> Manifest:
    if isinstance(format, Chosen):
        return replace(source, layers=format.layers)
    if format is None or format == KEEP:
        return source
    wanted = check_format(format)
    layers = tuple(
        LayerGeometry(layer.experts, layer.top_k, respecified(layer.spec, wanted)) for layer in source.layers
    )
    if layers != source.layers:
        check_encodable(wanted)
    return replace(source, layers=layers)


def _matrices(
    source: ModelSource, format: str | Chosen | None
) -> tuple[tuple[TrunkMatrix, ...], EncodeMatrix | None]:
    """The trunk's matrices in formats of their own: those that were chosen, and those that a pack has already."""
    chosen = format.matrices if isinstance(format, Chosen) else ()
    kept = source.pack.matrices if isinstance(source, PackCheckpoint) else ()
    if not chosen and not kept:
        return (), None

    there = source.matrices if isinstance(source, PackCheckpoint) else {}

    def encode(one: TrunkMatrix) -> Iterable[torch.Tensor]:
        if one in kept:
            return [there[one.name].blob]
        assert isinstance(format, Chosen) and format.encode_matrix is not None
        return format.encode_matrix(one)

    return (*kept, *chosen), encode


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """The folder, made if need be, and locked. Raises CoordinatorError for one that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise CoordinatorError(f"{folder} is a file; name a directory for the pack.")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / NAME).exists() and not is_begun(folder) and any(folder.iterdir()):
        raise CoordinatorError(f"{folder} is not empty and no pack; name another directory.")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CoordinatorError(f"Another `moehive convert` writes {folder}; wait for it.") from error
        yield
    finally:
        os.close(descriptor)
        if made:
            with suppress(OSError):  # nothing was begun in it unless it holds something
                folder.rmdir()


def _whole(wanted: Wanted) -> PackManifest | None:
    """The pack if this conversion has been made already, with all hashes that one has now.

    Raises CoordinatorError for the pack of another conversion.
    """
    folder = wanted.folder
    if not (folder / NAME).exists():
        return None
    found = read_manifest(folder)
    if found.identity != wanted.identity:
        raise another_pack(folder)
    if not found.trunk_hashed:
        return None
    finish(folder)
    return found


def _check_space(folder: Path, target: Manifest) -> None:
    """Fails at once when the disk can't hold what is left to write."""
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    written = sum(file.stat().st_blocks * 512 for file in folder.glob("experts-*.bin"))
    left = max(0, target.total_bytes - written)
    if left > free:
        raise CoordinatorError(
            f"{folder} has {free / 1e9:.1f} GB free, and {left / 1e9:.1f} GB are still to be written; free some"
            " space and run the same command again."
        )


class _Files:
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
class _Work:
    source: ModelSource
    target: Manifest
    files: _Files | None
    journal: Journal
    commit_bytes: int
    encode: Encode

    def do(self, expert: ExpertId) -> tuple[ExpertId, bytes]:
        """One expert, in a worker: read, encode, hash, write."""
        blob = self.source.expert_blob(expert)
        if _spec(self.source.manifest, expert) != _spec(self.target, expert):
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


def _spec(manifest: Manifest, expert: ExpertId) -> ExpertSpec:
    return manifest.layers[expert.layer].spec_of(expert.expert)


def _reencode(source: Manifest, target: Manifest, expert: ExpertId, blob: torch.Tensor) -> torch.Tensor:
    return reencode(_spec(source, expert), blob, _spec(target, expert))


def _run(work: _Work, workers: int, progress: Progress) -> None:
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
