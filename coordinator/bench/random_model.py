"""Models with random weights of real models' shapes, for measurements: what their files hold.

Every weight costs what a real one costs, and no number in a forward pass becomes infinite.
"""

from dataclasses import dataclass
from typing import Any

from ..estimate.geometries import CONTEXT, GEOMETRIES, VOCABULARY, ModelShape, TensorShape
from ..settings import SettingsError
from .random_blocks import GGUF_FORMATS
from .random_layouts import LAYOUTS

FORMATS = (*GGUF_FORMATS, *LAYOUTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """Which model: a geometry's name, and how much of it. `layers` and `experts` None: as many as the real model."""

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

    def metadata(self) -> dict[str, Any]:
        """What the file says of the model, by key, but for its tokenizer and its own name."""
        shape = self.shape
        keys: dict[str, Any] = {
            "block_count": self.layers or shape.layers,
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "embedding_length": shape.hidden,
            "feed_forward_length": shape.intermediate,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "expert_count": self.experts or shape.experts,
            "expert_used_count": shape.top_k,
            "expert_feed_forward_length": shape.intermediate,
            **shape.keys,
        }
        return {"general.architecture": shape.arch} | {f"{shape.arch}.{name}": value for name, value in keys.items()}
