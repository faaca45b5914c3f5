"""A pack as the coordinator sees it: the trunk is a checkpoint of its own, an expert is a range of a file."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from moehive.kernels.geometry import ExpertId
from moehive.kernels.linear import LinearWeights
from moehive.kernels.memory import WeightMemory

from ...models.tensors import Replaced, TensorSource
from ...types import CoordinatorError
from ..checkpoint import Checkpoint
from ..gguf.checkpoint import GgufCheckpoint
from ..outline import Outlines
from .fit import check_fit
from .manifest import NAME, TRUNK, PackManifest, file_name, offsets, read_manifest
from .matrices import NAME as MATRICES
from .matrices import map_matrices
from .trunk import GGUF_NAME

if TYPE_CHECKING:
    from ..architecture import Architecture


class FileRange(NamedTuple):
    """Bytes of a file: `offset` is a multiple of 4096."""

    path: Path
    offset: int
    nbytes: int


class PackCheckpoint:
    """One model in a pack. `expert_blob` may be called from several threads; `manifest` describes the experts.

    `trunk` is the checkpoint that everything but the experts comes from: the pack's own, or the source of a pack that
    is served in place.
    """

    def __init__(self, path: Path, pack: PackManifest, trunk: Checkpoint | GgufCheckpoint) -> None:
        """Use `PackCheckpoint.open`."""
        self.path = path
        self.pack = pack
        self.trunk = trunk
        self.manifest = pack.manifest
        self.computed_as_stored = True
        self.family = trunk.family
        self.config: PreTrainedConfig = trunk.config
        self.dtype = trunk.dtype
        self.context_length = trunk.context_length

    @classmethod
    def open(cls, path: Path, outlines: Outlines | None = None) -> PackCheckpoint:
        """Opens the pack in directory `path`; `outlines` as for `open_model`.

        Raises CoordinatorError, one sentence, for a pack that is not whole, or whose manifest does not fit its model.
        """
        pack = read_manifest(path)
        if pack.in_place:
            source = Path(pack.source)
            try:
                there = source.exists()
            except OSError as error:
                raise CoordinatorError(f"{source} cannot be read: {error.strerror}.") from error
            if not there:
                raise CoordinatorError(
                    f"{path} serves {source} in place, which is gone; bring it back or convert it."
                )
            trunk = _open(source, pack, outlines)
            if trunk.manifest.fingerprint != pack.source_fingerprint:
                raise CoordinatorError(f"{source} was changed after {path} was made of it; convert it again.")
            check_fit(path, pack, trunk)
            return cls(path, pack, trunk)
        gguf = path / TRUNK / GGUF_NAME
        trunk = _open(gguf if gguf.exists() else path / TRUNK, pack, outlines)
        check_fit(path, pack, trunk)
        return cls(path, pack, trunk)

    def expert_blob(self, expert: ExpertId) -> torch.Tensor:
        """One expert's blob (kernels/geometry.py), uint8 [manifest.nbytes(expert)], checked against its hash.

        It shares the file's pages (private to this process once written to). Raises CoordinatorError when the file
        can't be read, or when its bytes are not those that were written.
        """
        blob = self.trunk.expert_blob(expert) if self.pack.in_place else _map(self.expert_range(expert))
        digest = self.pack.new_digest()
        digest.update(blob.numpy())
        if digest.digest() != self.pack.digest(expert):
            raise CoordinatorError(
                f"Expert {expert.expert} of MoE layer {expert.layer} in {self.path} is damaged; run `moehive verify`,"
                " then copy or convert the model again."
            )
        return blob

    def expert_digest(self, expert: ExpertId) -> bytes | None:
        """One expert's hash (kernels/digest.py) as it was when the pack was made; None in packs with older hashes."""
        return self.pack.digest(expert) if self.pack.has_blake3 else None

    def expert_range(self, expert: ExpertId) -> FileRange | None:
        """Where one expert's blob lies, for who sends or maps it as it is; None in a pack that is served in place."""
        if self.pack.in_place:
            return None
        begin = offsets(self.manifest.layers[expert.layer])[expert.expert]
        return FileRange(self.path / file_name(expert.layer), begin, self.manifest.nbytes(expert))

    @property
    def matrices(self) -> dict[str, LinearWeights]:
        """The trunk's matrices that have formats of their own, mapped anew. Raises CoordinatorError."""
        return map_matrices(self.path / TRUNK / MATRICES, self.pack.matrices) if self.pack.matrices else {}

    def load_trunk(self) -> Architecture:
        """See Checkpoint.load_trunk."""
        if self.pack.matrices:
            raise CoordinatorError(
                f"{self.path} has a trunk in formats that only Moehive's native library computes; install Moehive "
                "with it, or convert the model without --budget."
            )
        return self.trunk.load_trunk()

    def trunk_tensors(self) -> TensorSource:
        """See Checkpoint.trunk_tensors."""
        tensors = self.trunk.trunk_tensors()
        return Replaced(tensors, self.matrices, WeightMemory()) if self.pack.matrices else tensors

    def tokenizer(self) -> tuple[Any, frozenset[int]]:
        """See Checkpoint.tokenizer."""
        return self.trunk.tokenizer()


def is_pack(path: Path) -> bool:
    """Whether a directory is a pack, whole or not."""
    return (path / NAME).exists()


def _open(path: Path, pack: PackManifest, outlines: Outlines | None) -> Checkpoint | GgufCheckpoint:
    manifest = None if pack.in_place else pack.manifest
    name = pack.manifest.name
    if path.is_dir():
        return Checkpoint.open(path, name, manifest, outlines)
    return GgufCheckpoint.open(path, name, manifest, outlines)


def _map(place: FileRange | None) -> torch.Tensor:
    assert place is not None
    try:
        with place.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < place.offset + place.nbytes:
                raise CoordinatorError(f"{place.path} has become shorter; copy the pack again.")
            mapped = mmap.mmap(
                file.fileno(), place.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=place.offset
            )
    except OSError as error:
        raise CoordinatorError(f"{place.path} can't be read: {error.strerror}.") from error
    return torch.frombuffer(mapped, dtype=torch.uint8)
