"""`moehive convert --budget`: the formats that harm least for the bytes, chosen once for a pack."""

import asyncio
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from moehive.kernels.geometry import ExpertId, Format

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.opening import ModelSource, trunk_of
from ..checkpoints.pack.convert import Chosen
from ..checkpoints.pack.manifest import NAME
from ..checkpoints.pack.matrices import TrunkMatrix
from ..checkpoints.pack.unfinished import CALIBRATION, CHOICE, another_beginning, another_pack
from ..estimate.cluster import read_cluster
from ..estimate.headers import of_files
from ..estimate.holding import room_for_weights
from ..estimate.this_machine import this_machine
from ..precision.choice import choose_formats
from ..precision.encode import encode
from ..precision.inputs import KeptInputs
from ..precision.kept_choice import KeptChoice, keep_choice, kept_choice
from ..precision.text import calibration_text, calibration_texts
from ..precision.trunk_parts import TrunkMatrices, encode_matrix
from ..serving.text import Text
from ..settings import parse_size
from ..sizes import in_bytes
from ..trunk import load_trunk
from ..types import CoordinatorError
from ..whole_file import remove_halves
from .progress import stages

_KEPT_BYTES = 4 << 30  # of experts in memory while a calibration text is run


def budget_bytes(source: str, budget: str, cluster: Path | None) -> int | None:
    """Bytes for all weights of `source`; of 'cluster': those that it has room for.

    None: those that this machine has room for, which differ from hour to hour. Raises CoordinatorError.
    """
    if budget != "cluster":
        return parse_size(budget)
    return None if cluster is None else room_for_weights(of_files(source), read_cluster(cluster))


def trunk_matrices(source: ModelSource, threads: int) -> TrunkMatrices | None:
    """What of the trunk may be rounded; a GGUF's keeps the formats that its maker chose."""
    files = trunk_of(source)
    if not isinstance(files, Checkpoint):
        return None
    plain = frozenset(files.trunk_tensors().plain_matrices())
    return TrunkMatrices.of(source.config.get_text_config(decoder=True), source.trunk_tensors(), plain, threads)


@dataclass(frozen=True, slots=True)
class BudgetChooser:
    """Chooses the formats of `opened`, or takes up what was chosen before; it is called with the pack's folder.

    `source` is what it was opened as; `budget` as `budget_bytes` gives it; `calibration`: a text; `quiet`: nothing is
    said. `memory`: bytes of experts that may be held while the text is run.
    """

    source: str
    opened: ModelSource
    budget: int | None
    calibration: Path | None
    threads: int
    quiet: bool
    memory: int = _KEPT_BYTES

    def __call__(self, folder: Path) -> Chosen:
        """Raises CoordinatorError, also for the pack of another source or other options; OSError."""
        key = self._key()
        kept = kept_choice(folder / CHOICE)
        if kept is None:
            kept = self._choose(key, folder)
        elif kept.key != key:
            raise another_pack(folder) if (folder / NAME).exists() else another_beginning(folder)
        elif not self.quiet:
            typer.echo(f"Formats were chosen before, for {in_bytes(kept.budget)}.")
        return self._chosen(kept, folder)

    def _key(self) -> bytes:
        """Differs when the source or an option does; not with the memory that happens to be free."""
        manifest, budget = self.opened.manifest, "this machine" if self.budget is None else str(self.budget)
        parts = (manifest.name, manifest.fingerprint, budget, calibration_text(self.calibration))
        return hashlib.sha256(b"".join(hashlib.sha256(part.encode()).digest() for part in parts)).digest()

    def _choose(self, key: bytes, folder: Path) -> KeptChoice:
        budget = self.budget
        if budget is None:
            budget = room_for_weights(of_files(self.source), this_machine())
        text = Text(*self.opened.tokenizer())
        if not text.has_tokenizer:
            raise CoordinatorError(
                f"{self.source} has no tokenizer, so no text can be run to choose formats with; add its tokenizer's"
                " files, or give all experts one --format."
            )
        texts = asyncio.run(calibration_texts(text, self.calibration))
        left = budget - of_files(self.source).trunk_bytes
        matrices = trunk_matrices(self.opened, self.threads)
        if matrices is not None:
            left += matrices.own_bytes
        calibration = folder / CALIBRATION
        if calibration.exists():  # of a run that was stopped before it had chosen
            shutil.rmtree(calibration)
        remove_halves(folder / CHOICE)
        with stages(self.quiet) as progress:
            choice = choose_formats(
                self.opened.manifest,
                self.opened.expert_blob,
                load_trunk(self.opened, self.threads) if matrices is None else matrices,
                texts,
                left,
                self.memory,
                self.threads,
                calibration,
                progress,
            )
        kept = KeptChoice.of(key, budget, choice)
        keep_choice(folder / CHOICE, kept)
        if not self.quiet:
            counts = Counter(fmt for layer in kept.formats for formats in layer for fmt in formats)
            typer.echo(
                f"Experts take {in_bytes(choice.precision.nbytes)}; expected divergence {kept.damage:.3g} nats a "
                f"token, of which the best choice would spare {kept.gap:.2%} at most. Projections: {_named(counts)}."
            )
            if kept.trunk:
                counts = Counter(one.format for one in kept.trunk)
                typer.echo(f"Matrices of the trunk that are rounded: {_named(counts)}.")
        return kept

    def _chosen(self, kept: KeptChoice, folder: Path) -> Chosen:
        source, layers = self.opened, kept.layers(self.opened.manifest)
        inputs = KeptInputs(folder / CALIBRATION, kept.inputs)
        tensors = source.trunk_tensors()
        squares = {one.name: one.squares for one in kept.trunk}

        def expert_blob(expert: ExpertId, blob: torch.Tensor) -> torch.Tensor:
            old, new = (each[expert.layer].spec_of(expert.expert) for each in (source.manifest.layers, layers))
            return encode(old, blob, new, (inputs[expert.layer], expert.expert))

        def matrix_blob(one: TrunkMatrix) -> Iterable[torch.Tensor]:
            return encode_matrix(tensors.linear(one.name), one.format, squares[one.name])

        matrices = tuple(TrunkMatrix(one.name, one.format, one.rows, one.columns) for one in kept.trunk)
        return Chosen(layers, expert_blob, matrices, matrix_blob)


def _named(counts: Mapping[Format, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda each: -each[1]))
