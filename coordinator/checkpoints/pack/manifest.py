"""A pack: one model in a directory, its experts laid out as nodes compute them, with a hash for each.

    pack.msgpack         what this module reads and writes; written last, so a directory that has it is whole
    experts-00000.bin    all experts of MoE layer 0, one blob (kernels/geometry.py) after the other, each at a
                         multiple of 4096 bytes, so that a file's pages can be mapped or sent as they are
    trunk/               the rest of the model as its source has it: a checkpoint without routed experts; what of it
                         has a format of its own is in matrices.bin (matrices.py)

A pack that is served in place has neither files nor trunk, only where its source lies, and hashes of both.
"""

import hashlib
import os
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import msgpack

from moehive.kernels.digest import DIGEST_BYTES, Digest, new_digest
from moehive.kernels.geometry import MAX_LAYERS, ExpertId, GeometryError, LayerGeometry, Manifest
from moehive.kernels.manifest import from_bytes, to_bytes

from ...regular_file import check_regular
from ...types import CoordinatorError
from ...whole_file import sync_folder
from ..links import refuse_links_out
from . import matrices as own

NAME = "pack.msgpack"
TRUNK = "trunk"
PAGE = 4096  # bytes
VERSION = 4
# 1 had no matrices of the trunk's; 1 and 2 had SHA-256; up to 3 one in place had no hashes of its trunk.
_KNOWN_VERSIONS = (1, 2, 3, VERSION)
MAX_BYTES = 256 << 20
_MAX_PARTS = 1 << 16  # of the trunk
_MAX_NAME = 512  # characters of a part's name
_MAX_PATH = 4096  # characters of a source's


@dataclass(frozen=True, slots=True)
class TrunkPart:
    """One file of `trunk/`, or of a source in place a tensor or file: its name, size in bytes, and hash."""

    name: str
    nbytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class PackManifest:
    """What `pack.msgpack` holds.

    `hashes[layer]` are the hashes of the layer's blobs, 32 bytes each, one after the other. `identity` says which
    source and which format the pack was made of (`identity_of`). `source`: where the checkpoint lies that is served
    in place, else empty. `source_fingerprint`: the source's own, as it was.
    """

    manifest: Manifest
    identity: bytes
    hashes: tuple[bytes, ...]
    source: str = ""
    source_fingerprint: str = ""
    trunk: tuple[TrunkPart, ...] = field(default=())
    matrices: tuple[own.TrunkMatrix, ...] = field(default=())
    version: int = VERSION

    @property
    def in_place(self) -> bool:
        """Whether the experts stay in the source's files."""
        return bool(self.source)

    @property
    def has_blake3(self) -> bool:
        """Whether its hashes are kernels/digest.py's."""
        return self.version >= 3

    @property
    def trunk_hashed(self) -> bool:
        """Whether it has hashes of its trunk: one in place has none if an earlier build made it."""
        return not self.in_place or self.version >= 4

    def new_digest(self) -> Digest:
        """What its hashes are made with: kernels/digest.py's, in older packs SHA-256."""
        return new_digest() if self.has_blake3 else hashlib.sha256()

    def digest(self, expert: ExpertId) -> bytes:
        """The hash of one expert's blob."""
        start = expert.expert * DIGEST_BYTES
        return self.hashes[expert.layer][start : start + DIGEST_BYTES]


def file_name(layer: int) -> str:
    """The file of a MoE layer's experts."""
    return f"experts-{layer:05d}.bin"


@lru_cache(maxsize=2 * MAX_LAYERS)
def offsets(layer: LayerGeometry) -> tuple[int, ...]:
    """Where each expert of a layer begins in its file, and, last, where the file ends."""
    sizes = (layer.spec_of(expert).nbytes for expert in range(layer.experts))
    return tuple(accumulate((-(-nbytes // PAGE) * PAGE for nbytes in sizes), initial=0))


def content_fingerprint(manifest: Manifest, hashes: tuple[bytes, ...]) -> str:
    """A fingerprint of what the experts are, whenever and wherever the pack was made."""
    digest = hashlib.sha256()
    for layer, found in zip(manifest.layers, hashes, strict=True):
        digest.update(repr(layer).encode())
        digest.update(found)
    return digest.hexdigest()


def identity_of(
    source: Manifest, target: Manifest, in_place: bool, matrices: tuple[own.TrunkMatrix, ...] = ()
) -> bytes:
    """32 bytes that differ when the source or what it is to become differs."""
    trunk = repr(matrices).encode() if matrices else b""
    return hashlib.sha256(to_bytes(source) + to_bytes(target) + bytes([in_place]) + trunk).digest()


def write_manifest(folder: Path, pack: PackManifest) -> None:
    """Writes `pack.msgpack` beside, then in its place; afterwards the pack is whole. Raises OSError."""
    packed = {
        "version": VERSION,
        "manifest": to_bytes(pack.manifest),
        "identity": pack.identity,
        "hashes": list(pack.hashes),
        "source": pack.source,
        "source_fingerprint": pack.source_fingerprint,
        "trunk": [[part.name, part.nbytes, part.digest] for part in pack.trunk],
        "matrices": [list(one) for one in pack.matrices],
    }
    body = cast(bytes, msgpack.packb(packed))
    part = folder / f".{NAME}"
    with part.open("wb") as out:
        out.write(cast(bytes, msgpack.packb({"body": body, "sha256": hashlib.sha256(body).digest()})))
        out.flush()
        os.fsync(out.fileno())
    part.rename(folder / NAME)
    sync_folder(folder)


def read_manifest(folder: Path) -> PackManifest:
    """Reads and checks `pack.msgpack`; the sizes of the files that it speaks of are checked too.

    Raises CoordinatorError, one sentence, for anything that `write_manifest` would not have written.
    """
    path = folder / NAME
    try:
        check_regular(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise CoordinatorError(f"{path} has {size} bytes; a pack's manifest has at most {MAX_BYTES}.")
            data = file.read()
    except FileNotFoundError as error:
        raise CoordinatorError(f"{folder} is no pack, for it has no {NAME}; `moehive convert` makes one.") from error
    except OSError as error:
        raise CoordinatorError(f"{path} can't be read: {error.strerror}.") from error
    try:
        outer: Any = msgpack.unpackb(data, max_map_len=2, max_bin_len=MAX_BYTES)
        if hashlib.sha256(outer["body"]).digest() != outer["sha256"]:
            raise CoordinatorError(f"{path} is damaged; copy the pack again, or convert the model again.")
        pack = _checked(
            msgpack.unpackb(outer["body"], max_map_len=64, max_array_len=_MAX_PARTS, max_bin_len=MAX_BYTES)
        )
    except CoordinatorError:
        raise
    except GeometryError as error:
        raise CoordinatorError(f"{path}: {error}") from error
    except Exception as error:  # msgpack raises many kinds for hostile bytes, and so do fields of the wrong type
        raise CoordinatorError(f"{path} is not a pack's manifest, or is damaged; convert the model again.") from error
    if content_fingerprint(pack.manifest, pack.hashes) != pack.manifest.fingerprint:
        raise CoordinatorError(
            f"{path} contradicts itself (its fingerprint is of other experts); copy the pack again."
        )
    _check_files(folder, pack)
    return pack


def _checked(packed: dict[str, Any]) -> PackManifest:
    if packed["version"] not in _KNOWN_VERSIONS:
        raise CoordinatorError(
            f"The pack has version {repr(packed['version'])[:40]}; this build reads {VERSION}. Convert the model "
            "again."
        )
    manifest = from_bytes(packed["manifest"])
    pack = PackManifest(
        manifest,
        packed["identity"],
        tuple(packed["hashes"]),
        packed["source"],
        packed["source_fingerprint"],
        tuple(TrunkPart(*part) for part in packed["trunk"]),
        own.checked(packed["matrices"]) if packed["version"] > 1 else (),
        packed["version"],
    )
    whole = (
        type(pack.identity) is bytes
        and len(pack.identity) == DIGEST_BYTES
        and all(type(found) is bytes for found in pack.hashes)
        and [len(found) for found in pack.hashes] == [layer.experts * DIGEST_BYTES for layer in manifest.layers]
        and type(pack.source) is str
        and len(pack.source) <= _MAX_PATH
        and pack.source.isprintable()  # it stands in sentences
        and type(pack.source_fingerprint) is str
        and all(
            type(part.name) is str
            and len(part.name) <= _MAX_NAME
            and type(part.nbytes) is int
            and type(part.digest) is bytes
            and (pack.in_place or _is_file_name(part.name))
            for part in pack.trunk
        )
    )
    if not whole:
        raise GeometryError("A pack's manifest has a field of the wrong type or size.")
    return pack


def _is_file_name(name: str) -> bool:
    """Whether it names something directly in a folder."""
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def _check_files(folder: Path, pack: PackManifest) -> None:
    if pack.in_place:
        return
    wanted = {folder / file_name(number): offsets(layer)[-1] for number, layer in enumerate(pack.manifest.layers)}
    wanted |= {folder / TRUNK / part.name: part.nbytes for part in pack.trunk}
    if pack.matrices:
        wanted[folder / TRUNK / own.NAME] = own.offsets(pack.matrices)[-1]
    for path, nbytes in wanted.items():
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CoordinatorError(f"{path} can't be read ({error.strerror}); copy the pack again.") from error
        if size != nbytes:
            raise CoordinatorError(f"{path} has {size} bytes, but {nbytes} belong into it; copy the pack again.")
    refuse_links_out(wanted, (folder,), "the pack")
