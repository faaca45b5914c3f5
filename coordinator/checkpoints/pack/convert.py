"""`moehive convert`: a checkpoint into a pack, expert by expert, in a way that any kill or full disk only interrupts.

What is wanted has an identity, by which a second run finds what the first one finished; experts.py makes the experts.
"""

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic

import torch

from moehive.kernels.geometry import ExpertId, LayerGeometry, Manifest

from ...sizes import in_bytes
from ...types import CoordinatorError
from ..opening import ModelSource, trunk_of
from .checkpoint import PackCheckpoint
from .encoding import check_encodable, check_format, reencode, respecified
from .experts import Encode, Files, Progress, Work, spec_of, write_experts
from .journal import Journal
from .manifest import (
    NAME,
    PackManifest,
    content_fingerprint,
    identity_of,
    read_manifest,
    write_manifest,
)
from .matrices import Encode as EncodeMatrix
from .matrices import TrunkMatrix
from .room import bytes_left, check_room
from .source_trunk import hash_source
from .trunk import hash_trunk, write_trunk
from .unfinished import another_pack, check_way, finish, is_begun

KEEP = "keep"  # as a format: each tensor's own
COMMIT_BYTES = 64 << 20  # written between two entries in the journal, about


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
        left = "" if wanted is None or wanted.in_place else f" ({in_bytes(wanted.bytes_left())} are still to come)"
        raise CoordinatorError(
            f"{folder} can't be written ({error.strerror}); what is finished stays, so free some space{left} and run "
            "the same command again, or delete that directory and name one on another disk."
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

    def bytes_left(self) -> int:
        """Bytes that its folder still takes of the disk; of a copy. Raises OSError."""
        return bytes_left(self.folder, self.target, trunk_of(self.source), self.matrices)


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
    if not in_place:
        check_room(folder, wanted.bytes_left())  # before anything is in the folder
    with ExitStack() as stack:
        journal = Journal(folder, wanted.identity, target)
        stack.callback(journal.close)
        resumed = len(journal.finished)
        files = None if in_place else Files(folder, target, journal, stack)
        write_experts(Work(source, target, files, journal, commit_bytes, wanted.encode), workers, progress)
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


def _reencode(source: Manifest, target: Manifest, expert: ExpertId, blob: torch.Tensor) -> torch.Tensor:
    return reencode(spec_of(source, expert), blob, spec_of(target, expert))
