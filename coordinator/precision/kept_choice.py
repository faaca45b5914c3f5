"""What was chosen for a budget, kept in a file as soon as it is: choosing takes longer than converting.

With it go the layers' inputs (inputs.py), so that a conversion that was killed goes on with the same choice.
"""

import hashlib
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgpack
import numpy as np
import torch

from moehive.kernels.geometry import Format, GeometryError, LayerGeometry, Manifest

from ..types import CoordinatorError
from ..whole_file import whole_file
from .choice import BudgetChoice
from .inputs import InputsFile

VERSION = 2
_MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class KeptMatrix:
    """A matrix of the trunk, its new format, and the mean squares of its inputs, f32 [columns]."""

    name: str
    format: Format
    rows: int
    columns: int
    squares: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KeptChoice:
    """`key`: 32 bytes that say which source and options it was made for; `budget`: bytes of the whole model.

    `damage`: the divergence that is expected, nats a token; `gap`: the share of it, at most, that the best choice for
    the same bytes would spare. `formats`: of each layer's experts.
    """

    key: bytes
    budget: int
    damage: float
    gap: float
    formats: tuple[tuple[tuple[Format, Format], ...], ...]
    trunk: tuple[KeptMatrix, ...]
    inputs: tuple[InputsFile, ...]

    @classmethod
    def of(cls, key: bytes, budget: int, choice: BudgetChoice) -> "KeptChoice":
        """What is kept of a choice that was just made."""
        trunk = tuple(
            KeptMatrix(one.part.name, one.format, one.part.rows, one.part.columns, one.part.inputs.squares)
            for one in choice.trunk
        )
        formats = tuple(layer.formats for layer in choice.precision.layers)
        chosen = choice.precision
        return cls(key, budget, chosen.damage, chosen.gap, formats, trunk, choice.inputs.files)

    def layers(self, source: Manifest) -> tuple[LayerGeometry, ...]:
        """The source's layers as they are to be."""
        return tuple(
            replace(layer, formats=formats) for layer, formats in zip(source.layers, self.formats, strict=True)
        )


def keep_choice(path: Path, choice: KeptChoice) -> None:
    """Writes it beside, then in its place. Raises OSError."""
    packed = {
        "version": VERSION,
        "key": choice.key,
        "budget": choice.budget,
        "damage": choice.damage,
        "gap": choice.gap,
        "formats": choice.formats,
        "trunk": [
            [one.name, one.format, one.rows, one.columns, one.squares.numpy().tobytes()] for one in choice.trunk
        ],
        "inputs": [list(astuple(file)) for file in choice.inputs],
    }
    body = cast(bytes, msgpack.packb(packed))
    with whole_file(path) as out:
        out.write(cast(bytes, msgpack.packb({"body": body, "sha256": hashlib.sha256(body).digest()})))


def kept_choice(path: Path) -> KeptChoice | None:
    """The choice that is kept there; None if there is none. Raises CoordinatorError for one that is damaged."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CoordinatorError(f"{path} can't be read: {error.strerror}.") from error
    try:
        outer: Any = msgpack.unpackb(data, max_bin_len=_MAX_BYTES)
        if hashlib.sha256(outer["body"]).digest() != outer["sha256"]:
            raise GeometryError("Its hash is another.")
        packed: Any = msgpack.unpackb(outer["body"], use_list=False, max_bin_len=_MAX_BYTES)
        if packed["version"] != VERSION:
            raise GeometryError("Its version is another.")
        return KeptChoice(
            packed["key"],
            packed["budget"],
            packed["damage"],
            packed["gap"],
            packed["formats"],
            tuple(_matrix(*row) for row in packed["trunk"]),
            tuple(InputsFile(*file) for file in packed["inputs"]),
        )
    except Exception as error:  # msgpack raises many kinds for damaged bytes, and so do fields of the wrong type
        raise CoordinatorError(
            f"{path} is damaged or of another version; delete {path.parent} and convert again."
        ) from error


def _matrix(name: str, format: Format, rows: int, columns: int, squares: bytes) -> KeptMatrix:
    return KeptMatrix(name, format, rows, columns, torch.from_numpy(np.frombuffer(squares, np.float32).copy()))
