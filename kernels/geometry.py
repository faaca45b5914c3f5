"""The lowest nouns: which expert, what it computes, where its tensors lie in its bytes.

An expert is described by data, not by a class for each family:

    y = down @ gate(up_projection @ x + bias) + bias, optionally RMS-normalized

Its bytes (its *blob*) hold the tensors of `ExpertSpec.tensors` one after the other, each aligned to 64 bytes,
little-endian: the projection into the intermediate size (gate's rows first, then up's), its bias, the projection
back, its bias, the norm's weight. Projections are [out, in] in the spec's format; biases and norms are f32,
which holds every 16-bit source exactly. Transposed or interleaved checkpoints are laid out like this while they
are read (coordinator/checkpoints), so that kernels know one layout.

Block formats (kernels/cpu/blocks.h) keep the bits of a file's blocks, with 16 rows side by side, rows padded to 16
and columns to whole blocks; gate and up are then two matrices, each padded.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Format = Literal[
    "f32", "bf16", "f16",
    "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs",
    "int4_g32", "int4_g64", "int4_g128", "mxfp4", "fp8_block",
]  # fmt: skip

ALIGNMENT = 64  # bytes; a cache line, and the widest vector load
PLAIN_BYTES: dict[str, int] = {"f32": 4, "bf16": 2, "f16": 2}  # of one number
# How products take their vectors: in f32, or rounded to bf16; those of other formats in 8 bits.
FLOAT_FORMATS, ROUNDED_FORMATS = ("f32", "f16"), ("bf16", "fp8_block")
# Columns that share scales, and the bytes that they take in one row.
BLOCKS: dict[str, tuple[int, int]] = {
    "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "iq4_nl": (32, 18),
    "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
    "iq4_xs": (256, 136),
    "int4_g32": (32, 19), "int4_g64": (64, 35), "int4_g128": (128, 67), "mxfp4": (32, 17), "fp8_block": (128, 129),
}  # fmt: skip
GPU_BLOCKS = (
    "int4_g32",
    "int4_g64",
    "int4_g128",
    "fp8_block",
    "mxfp4",
    "q8_0",
    "q4_0",
    "q4_k",
    "q6_k",
)  # with kernels
GROUP_ROWS = 16  # that lie side by side in a block format

# Bounds on what a manifest may claim, checked before anything is allocated.
MAX_LAYERS = 1024
MAX_EXPERTS = 65_536
MAX_TOP_K = 64
MAX_SIZE = 65_536  # hidden and intermediate size


class GeometryError(ValueError):
    """A description of experts that cannot be; its text is one sentence for a person."""


def tensor_bytes(fmt: str, rows: int, columns: int) -> int:
    """Bytes of a projection [rows, columns] in a format, padding of rows and columns included."""
    if fmt in PLAIN_BYTES:
        return rows * columns * PLAIN_BYTES[fmt]
    block, nbytes = BLOCKS[fmt]
    return -(-rows // GROUP_ROWS) * GROUP_ROWS * -(-columns // block) * nbytes


class ExpertId(NamedTuple):
    """One routed expert: the ordinal of its MoE layer (not of the decoder layer), its number in that layer."""

    layer: int
    expert: int


class TensorPlace(NamedTuple):
    """Where one tensor lies in an expert's blob: offset and size in bytes, both of the tensor itself.

    A block format's tensor is `matrices` of equal shape, one after the other.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    nbytes: int
    matrices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """What the experts of one layer compute.

    Gated: `act(min(g, limit)) * (clamp(u, ±limit) + up_offset)`; otherwise `act(u)`. With
    `limit_after_activation` the bound applies to `act(g)` instead of `g` (Step-3.7). `alpha` scales silu's
    sigmoid: x * sigmoid(alpha * x) (gpt-oss: alpha 1.702, limit 7, up_offset 1). The optional norm is
    z * rsqrt(mean(z²) + eps) with z = y * weight: it scales first, then normalizes (MuseSpark; the blob's weight
    is the checkpoint's plus 1).
    """

    hidden_size: int
    intermediate_size: int
    activation: Activation
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    limit_after_activation: bool = False
    up_offset: float = 0.0
    bias: bool = False
    post_norm_eps: float | None = None
    format: Format = "bf16"  # of the projection into the intermediate size, and of the one back unless:
    down_format: Format | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            size = getattr(self, name)
            if not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
                raise GeometryError(f"An expert's {name} must be 1 to {MAX_SIZE}, not {size!r}.")
        if self.activation not in get_args(Activation):
            choices = ", ".join(get_args(Activation))
            raise GeometryError(f"Unknown activation {self.activation!r}; known are {choices}.")
        for fmt in (self.format, self.back_format):
            if fmt not in get_args(Format):
                raise GeometryError(f"Unknown format {fmt!r}; known are {', '.join(get_args(Format))}.")
        numbers = [self.alpha, self.up_offset]
        numbers += [n for n in (self.limit, self.post_norm_eps) if n is not None]
        if not all(math.isfinite(n) for n in numbers):
            raise GeometryError("An expert's alpha, limit, offset and epsilon must be finite numbers.")
        if self.limit is not None and self.limit <= 0:
            raise GeometryError(f"An expert's limit must be above 0, not {self.limit!r}; None means no limit.")
        if self.post_norm_eps is not None and self.post_norm_eps < 0:
            raise GeometryError(f"An expert's post_norm_eps must not be below 0, as {self.post_norm_eps!r} is.")
        if self.alpha != 1.0 and self.activation != "silu":
            raise GeometryError(f"alpha belongs to silu; {self.activation} has none.")

    @property
    def back_format(self) -> Format:
        """The format of the projection back to the hidden size."""
        return self.down_format or self.format

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes it where there is one (kernels/gpu); else it stays on the CPU."""
        if self.format == "fp8_block" and self.gated and self.intermediate_size % BLOCKS["fp8_block"][0]:
            return False
        return all(fmt in PLAIN_BYTES or fmt in GPU_BLOCKS for fmt in (self.format, self.back_format))

    @property
    def projected_size(self) -> int:
        """Rows of the first projection: gate and up, or up alone."""
        return 2 * self.intermediate_size if self.gated else self.intermediate_size

    @property
    def weights(self) -> int:
        """Numbers in the matrices: multiply-adds of a token."""
        return (self.projected_size + self.intermediate_size) * self.hidden_size

    @property
    def tensors(self) -> tuple[TensorPlace, ...]:
        """The blob's tensors in order: `up`, `up_bias`, `down`, `down_bias`, `post_norm` (those that exist)."""
        wanted: list[tuple[str, tuple[int, ...], Format]] = [
            ("up", (self.projected_size, self.hidden_size), self.format)
        ]
        if self.bias:
            wanted.append(("up_bias", (self.projected_size,), "f32"))
        wanted.append(("down", (self.hidden_size, self.intermediate_size), self.back_format))
        if self.bias:
            wanted.append(("down_bias", (self.hidden_size,), "f32"))
        if self.post_norm_eps is not None:
            wanted.append(("post_norm", (self.hidden_size,), "f32"))
        places: list[TensorPlace] = []
        offset = 0
        for name, shape, fmt in wanted:
            if fmt in PLAIN_BYTES:
                nbytes, matrices = math.prod(shape) * PLAIN_BYTES[fmt], 1
            else:
                matrices = 2 if name == "up" and self.gated else 1
                nbytes = matrices * tensor_bytes(fmt, shape[0] // matrices, shape[1])
            places.append(TensorPlace(name, shape, fmt, offset, nbytes, matrices))
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return tuple(places)

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's blob, padding included."""
        last = self.tensors[-1]
        return last.offset + -(-last.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """One MoE layer: how many experts it has, how many of them a token is sent to, what each computes.

    `formats` are those of each expert's two projections, in, back; empty: all are as `spec` says.
    """

    experts: int
    top_k: int
    spec: ExpertSpec
    formats: tuple[tuple[Format, Format], ...] = ()

    def __post_init__(self) -> None:
        if self.formats and len(self.formats) != self.experts:
            raise GeometryError(f"A layer of {self.experts} experts can't have formats for {len(self.formats)}.")
        for formats in set(self.formats):
            _with_formats(self.spec, formats)  # raises for an unknown one
        if not 1 <= self.experts <= MAX_EXPERTS:
            raise GeometryError(f"A layer must have 1 to {MAX_EXPERTS} experts, not {self.experts!r}.")
        if not 1 <= self.top_k <= min(self.experts, MAX_TOP_K):
            raise GeometryError(f"top_k must be 1 to {min(self.experts, MAX_TOP_K)}, not {self.top_k!r}.")

    def spec_of(self, expert: int) -> ExpertSpec:
        """What one expert computes and how it is stored; experts of the same formats share one object."""
        return _with_formats(self.spec, self.formats[expert]) if self.formats else self.spec

    @property
    def nbytes(self) -> int:
        """Bytes of all the layer's blobs."""
        if not self.formats:
            return self.experts * self.spec.nbytes
        return sum(count * _with_formats(self.spec, pair).nbytes for pair, count in Counter(self.formats).items())

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes all of them."""
        return (
            all(_with_formats(self.spec, pair).on_gpu for pair in set(self.formats))
            if self.formats
            else self.spec.on_gpu
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert, on average, rounded up."""
        return -(-self.nbytes // self.experts)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest expert."""
        return (
            max(_with_formats(self.spec, formats).nbytes for formats in set(self.formats))
            if self.formats
            else self.spec.nbytes
        )


def bytes_filled(nbytes: int, layers: Sequence[LayerGeometry]) -> int:
    """Of so many bytes, those that some layers' experts are sure to fill: experts are not split."""
    largest = max(layer.largest_bytes for layer in layers)
    if all(layer.nbytes == layer.experts * largest for layer in layers):
        return nbytes // largest * largest
    return max(0, nbytes - largest)


@lru_cache(maxsize=4096)
def _with_formats(spec: ExpertSpec, formats: tuple[Format, Format]) -> ExpertSpec:
    up, down = formats
    if (spec.format, spec.back_format) == formats:
        return spec
    return replace(spec, format=up, down_format=None if up == down else down)


@dataclass(frozen=True, slots=True)
class Manifest:
    """All routed experts of one model.

    `fingerprint` is 64 hexadecimal digits that change when any weight may have changed; nodes keep their
    disk cache by it.
    """

    name: str
    fingerprint: str
    layers: tuple[LayerGeometry, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise GeometryError(f"A model must have 1 to {MAX_LAYERS} MoE layers, not {len(self.layers)}.")
        if len(self.fingerprint) != 64 or set(self.fingerprint) - set("0123456789abcdef"):
            raise GeometryError("A model's fingerprint must be 64 hexadecimal digits.")
        if not 1 <= len(self.name) <= 256:
            raise GeometryError("A model's name must have 1 to 256 characters.")

    def nbytes(self, expert: ExpertId) -> int:
        """Bytes of one expert's blob."""
        return self.layers[expert.layer].spec_of(expert.expert).nbytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts' blobs."""
        return sum(layer.nbytes for layer in self.layers)
