"""`moehive verify`: every byte of a pack that has a hash is read and compared."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from moehive.kernels.digest import digest_of
from moehive.kernels.geometry import ExpertId

from .checkpoint import PackCheckpoint
from .hashing import hashed
from .manifest import TRUNK, PackManifest, file_name, offsets, read_manifest
from .source_trunk import damaged_parts

_AHEAD = 64  # experts handed to the threads at once


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found: experts whose blob differs from its hash (or can't be read), parts of the trunk likewise.

    Parts are files, or of a `source` in place tensors too. `trunk_hashed`: False for a pack in place that an earlier
    build made; its trunk was not read, for it has no hashes of it.
    """

    experts: int  # read
    nbytes: int  # of them and of the trunk
    damaged: tuple[ExpertId, ...]
    damaged_files: tuple[str, ...]
    source: str  # empty unless it is served in place
    trunk_hashed: bool


def verify(folder: Path, threads: int, progress: Callable[[int, int], None] = lambda *_: None) -> Verified:
    """Reads the pack in `folder` with `threads` threads; `progress` is told of bytes read, and of all.

    Raises CoordinatorError when it is no pack, its manifest or a file's size is wrong, or when nothing is damaged but
    the manifest does not fit the model.
    """
    pack = read_manifest(folder)
    in_place = PackCheckpoint.open(folder) if pack.in_place else None
    check = _copied(folder, pack) if in_place is None else _in_place(in_place)
    experts = [ExpertId(n, e) for n, layer in enumerate(pack.manifest.layers) for e in range(layer.experts)]
    total = pack.manifest.total_bytes + sum(part.nbytes for part in pack.trunk)
    done = 0
    damaged: list[ExpertId] = []
    with ThreadPoolExecutor(threads, "verify") as pool:
        for some in _pieces(experts):
            for expert, good in zip(some, pool.map(check, some), strict=True):
                done += pack.manifest.nbytes(expert)
                if not good:
                    damaged.append(expert)
                progress(done, total)
    parts = _damaged_files(folder, pack) if in_place is None else damaged_parts(in_place.trunk, pack.trunk)
    progress(total, total)
    if not damaged and not parts and in_place is None:
        PackCheckpoint.open(folder)  # not before: what is damaged is to be named
    return Verified(len(experts), total, tuple(damaged), tuple(parts), pack.source, pack.trunk_hashed)


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
        whole = hashed(path, begin, nbytes, pack.new_digest()) == pack.digest(expert)
        return whole and hashed(path, begin + nbytes, padding) == empty

    return check


def _in_place(opened: PackCheckpoint) -> Callable[[ExpertId], bool]:
    def check(expert: ExpertId) -> bool:
        digest = opened.pack.new_digest()
        digest.update(opened.trunk.expert_blob(expert).numpy())
        return digest.digest() == opened.pack.digest(expert)

    return check


def _damaged_files(folder: Path, pack: PackManifest) -> list[str]:
    trunk = folder / TRUNK
    return [
        file.name
        for file in pack.trunk
        if hashed(trunk / file.name, 0, file.nbytes, pack.new_digest()) != file.digest
    ]
