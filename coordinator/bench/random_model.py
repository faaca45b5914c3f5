"""Files with random weights of real models' shapes, for measurements: a GGUF, or a directory of safetensors.

Every weight costs what a real one costs, and no number in a forward pass becomes infinite.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..estimate.geometries import GEOMETRIES, VOCABULARY, ModelShape, TensorShape
from ..settings import SettingsError
from ..types import CoordinatorError
from .random_gguf import GGUF_FORMATS, write_gguf
from .random_safetensors import LAYOUTS, write_directory

FORMATS = (*GGUF_FORMATS, *LAYOUTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """Which file: a geometry's name, and how much of it. `layers` and `experts` None: as many as the real model."""

    geometry: str
    format: str
    layers: int | None = None
    experts: int | None = None

    def __post_init__(self) -> None:
        """Raises SettingsError."""
        if self.geometry not in GEOMETRIES:
            raise SettingsError(f"Unknown geometry {self.geometry!r}; known are {', '.join(GEOMETRIES)}.")
        if self.format not in FORMATS:
            raise SettingsError(f"Unknown format {self.format!r}; known are {', '.join(FORMATS)}.")
        shape = self.shape
        least = shape.keys.get("leading_dense_block_count", 0) + 1
        if self.layers is not None and not least <= self.layers <= shape.layers:
            raise SettingsError(f"--layers must be {least} to {shape.layers} for {self.geometry}.")
        if self.experts is not None and not shape.top_k <= self.experts <= shape.experts:
            raise SettingsError(f"--experts must be {shape.top_k} to {shape.experts} for {self.geometry}.")

    @property
    def shape(self) -> ModelShape:
        """The real model's."""
        return GEOMETRIES[self.geometry]

    @property
    def file_name(self) -> str:
        """Says all that the file depends on."""
        layers, experts = self.layers or self.shape.layers, self.experts or self.shape.experts
        name = f"{self.geometry}-{layers}l-{experts}e-{self.format}"
        return f"{name}.gguf" if self.format in GGUF_FORMATS else name

    def tensors(self) -> list[TensorShape]:
        """All tensors in a GGUF's order."""
        shape = self.shape
        tensors = [
            TensorShape("token_embd.weight", (VOCABULARY, shape.hidden), matrix=True),
            TensorShape("output_norm.weight", (shape.hidden,), mean=1.0),
            TensorShape("output.weight", (VOCABULARY, shape.hidden), matrix=True),
        ]
        for layer in range(self.layers or shape.layers):
            tensors += shape.tensors(shape, layer, self.experts or shape.experts)
        return tensors


def random_model(model: RandomModel, folder: Path) -> Path:
    """The file or directory in `folder`, written now unless it is there. Raises CoordinatorError for a full disk."""
    path = folder / model.file_name
    if path.exists():
        return path
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (write_gguf if model.format in GGUF_FORMATS else write_directory)(model, part)
        part.rename(path)
    except OSError as error:
        raise CoordinatorError(
            f"{path} can't be written ({error.strerror}); free some space or name another --state-dir."
        ) from error
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
    return path
