"""`moehive verify`: every byte of a pack that has a hash is read and compared."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from moehive.kernels.digest import Digest, digest_of, new_digest
from moehive.kernels.geometry import ExpertId

from ...types import CoordinatorError
from .checkpoint import PackCheckpoint
from .manifest import TRUNK, PackManifest, file_name, offsets, read_manifest

_PIECE = 4 << 20  # bytes read at once
_AHEAD = 64  # experts handed to the threads at once


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found: experts whose blob differs from its hash (or can't be read), files of the trunk likewise."""

    experts: int  # read
    nbytes: int  # of them and of the trunk
    damaged: tuple[ExpertId, ...]
    damaged_files: tuple[str, ...]


def verify(folder: Path, threads: int, progress: Callable[[int, int], None] = lambda *_: None) -> Verified:
    """Reads the pack in `folder` with `threads` threads; `progress` is told of bytes read, and of all.

    Raises CoordinatorError when it is no pack, or its manifest or a file's size is wrong.
    """
    pack = read_manifest(folder)
    check = _in_place(folder, pack) if pack.in_place else _copied(folder, pack)
    experts = [ExpertId(n, e) for n, layer in enumerate(pack.manifest.layers) for e in range(layer.experts)]
    total = pack.manifest.total_bytes + sum(file.nbytes for file in pack.trunk)
    done = 0
    damaged: list[ExpertId] = []
    with ThreadPoolExecutor(threads, "verify") as pool:
        for some in _pieces(experts):
            for expert, good in zip(some, pool.map(check, some), strict=True):
                done += pack.manifest.nbytes(expert)
                if not good:
                    damaged.append(expert)
                progress(done, total)
    files = []
    for file in pack.trunk:
        if _read(folder / TRUNK / file.name, 0, file.nbytes, pack.new_digest()) != file.digest:
            files.append(file.name)
        done += file.nbytes
        progress(done, total)
    return Verified(len(experts), total, tuple(damaged), tuple(files))


def _pieces(experts: list[ExpertId]) -> Iterator[list[ExpertId]]:
    """A few at a time, so that an interruption does not wait for all of them."""
    left = iter(experts)
    while some := list(islice(left, _AHEAD)):
        yield some


def _copied(folder: Path, pack: PackManifest) -> Callable[[ExpertId], bool]:
    def check(expert: ExpertId) -> bool:
        path, nbytes = folder / file_name(expert.layer), pack.manifest.nbytes(expert)
        begin, following = offsets(pack.manifest.layers[expert.layer])[expert.expert : expert.expert + 2]
        padding = following - begin - nbytes
        empty = digest_of(bytes(padding))  # up to the next page
        whole = _read(path, begin, nbytes, pack.new_digest()) == pack.digest(expert)
        return whole and _read(path, begin + nbytes, padding, new_digest()) == empty

    return check


def _in_place(folder: Path, pack: PackManifest) -> Callable[[ExpertId], bool]:
    opened = PackCheckpoint.open(folder)

    def check(expert: ExpertId) -> bool:
        digest = pack.new_digest()
        digest.update(opened.trunk.expert_blob(expert).numpy())
        return digest.digest() == pack.digest(expert)

    return check


def _read(path: Path, offset: int, nbytes: int, digest: Digest) -> bytes:
    """The hash of some bytes of a file; of no bytes at all when the file ends before them."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while nbytes:
                piece = os.pread(descriptor, min(nbytes, _PIECE), offset)
                if not piece:
                    return b""
                digest.update(piece)
                offset, nbytes = offset + len(piece), nbytes - len(piece)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CoordinatorError(f"{path} can't be read: {error.strerror}.") from error
    return digest.digest()
