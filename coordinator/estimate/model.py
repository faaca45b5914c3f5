"""What an estimate needs of a model: its routed experts' geometry, and how large the other parts are.

Nothing of the weights is read. A model comes from the table (`of_shape`), or from a checkpoint's headers or a config
(headers.py); both end in the same data.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

from moehive.kernels.geometry import BLOCKS, PLAIN_BYTES, ExpertSpec, Format, LayerGeometry, tensor_bytes

from ..types import CoordinatorError
from .geometries import ModelShape, TensorShape

EMBEDDING, HEAD, ATTENTION, SMALL = "embedding", "head", "attention", "routers, norms"
DENSE, SHARED = "dense MLPs", "shared experts"
# Matrices of latent attention that queries are absorbed by: held in 16 bits however they are stored
# (models/lean/deepseek.py).
LATENT = "latent attention"
PARTS = (EMBEDDING, HEAD, ATTENTION, LATENT, DENSE, SHARED, SMALL)
LATENT_NAMES = ("attn_kv_b.", "attn_k_b.", "attn_v_b.", "kv_b_proj.")
# From the best to the smallest; what an estimate chooses among.
CHOICES: tuple[Format, ...] = (
    "bf16", "q8_0", "fp8_block", "q6_k", "q5_k", "int4_g32", "q4_k", "mxfp4", "q4_0", "q3_k", "q2_k",
)  # fmt: skip
_EXPERTS_ALONE = ("int4_g32", "int4_g64", "int4_g128", "mxfp4")  # checkpoints in these keep the trunk in bf16


class Matrix(NamedTuple):
    """Rows and columns of a matrix of the trunk, and its bytes where they are known."""

    rows: int
    columns: int
    stored: int | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """One model. `layers` are its MoE layers in the chosen format, `decoder_layers` all of them.

    `parts`: the trunk's matrices by part; `tied`: the table of tokens is the head too. `format` is "as stored" for
    a checkpoint that is taken as it is. `mixture`: the formats of a model in several, and their shares of its bytes.
    """

    name: str
    format: str
    hidden: int
    decoder_layers: int
    layers: tuple[LayerGeometry, ...]
    parts: Mapping[str, tuple[Matrix, ...]]
    tied: bool
    kv_bytes_a_token: int  # of one token in all layers' caches, f16
    state_bytes: int  # recurrent state of one sequence in all layers, f32; each token reads and writes it
    mixture: tuple[tuple[str, float], ...] = ()

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts, as nodes hold them."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def active_expert_bytes(self) -> int:
        """Bytes of the experts of one token."""
        return sum(layer.top_k * layer.nbytes // layer.experts for layer in self.layers)

    def part_bytes(self) -> dict[str, int]:
        """Bytes of each part of the trunk."""
        return {part: sum(self.matrix_bytes(part)) for part in PARTS}

    def matrix_bytes(self, part: str) -> list[int]:
        """Bytes of each matrix of a part of the trunk."""
        if part == LATENT:
            return [2 * matrix.rows * matrix.columns for matrix in self.parts[part]]
        return [_matrix_bytes(matrix, self.trunk_format(part)) for matrix in self.parts[part]]

    @property
    def trunk_bytes(self) -> int:
        """Bytes of everything but routed experts."""
        return sum(self.part_bytes().values())

    def part_bytes_a_token(self) -> dict[str, int]:
        """Bytes of each part that one token reads: of the table of tokens a row, unless it is the head."""
        return self.part_bytes() | ({} if self.tied else {EMBEDDING: 0})

    @property
    def trunk_bytes_a_token(self) -> int:
        """Bytes of the trunk that one token reads."""
        return sum(self.part_bytes_a_token().values())

    @property
    def shared_bytes_a_layer(self) -> float:
        """Bytes of the shared expert of one MoE layer."""
        return self.part_bytes()[SHARED] / max(1, len(self.layers))

    @property
    def shared_weights_a_layer(self) -> float:
        """How many numbers it has."""
        return sum(m.rows * m.columns for m in self.parts[SHARED]) / max(1, len(self.layers))

    @property
    def total_bytes(self) -> int:
        """Trunk and experts."""
        return self.trunk_bytes + self.expert_bytes

    @property
    def weights(self) -> int:
        """How many numbers the model has."""
        trunk = sum(m.rows * m.columns for matrices in self.parts.values() for m in matrices)
        return trunk + sum(layer.experts * layer.spec.weights for layer in self.layers)

    @property
    def active_weights(self) -> int:
        """How many numbers one token is multiplied with."""
        head = sum(m.rows * m.columns for m in self.parts[EMBEDDING if self.tied else HEAD])
        return self.trunk_weights + head + sum(layer.top_k * layer.spec.weights for layer in self.layers)

    @property
    def trunk_weights(self) -> int:
        """How many numbers of the trunk each token of a prompt is multiplied with; the head is for the last alone."""
        return sum(m.rows * m.columns for part, ms in self.parts.items() for m in ms if part not in (EMBEDDING, HEAD))

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes its experts."""
        return all(layer.on_gpu for layer in self.layers)

    def in_format(self, format: Format) -> "Model":
        """The same model in another format; a trunk whose bytes are known stays as it is."""
        layers = tuple(
            replace(layer, spec=replace(layer.spec, format=format, down_format=None), formats=())
            for layer in self.layers
        )
        return replace(self, format=format, layers=layers)

    def by_format(self, known: Mapping[str, float], other: float) -> float:
        """A rate for this model's bytes, of rates that are `known` by format; `other`: of formats that are not."""
        return 1 / sum(share / known.get(name, other) for name, share in self.mixture or ((self.format, 1.0),))

    def trunk_format(self, part: str) -> str:
        """The format of a part of the trunk but latent attention's matrices; as `format`, no single one for some."""
        if part == SMALL:
            return "f32"
        return "bf16" if self.format in _EXPERTS_ALONE else self.format


def check_format(name: str) -> Format:
    """`name` as a format. Raises CoordinatorError with those that are known."""
    if name not in get_args(Format):
        raise CoordinatorError(f"Unknown format {name[:40]!r}; known are {', '.join(get_args(Format))}.")
    return name  # type: ignore[return-value]


def of_shape(
    name: str,
    shape: ModelShape,
    format: Format,
    layers: int | None = None,
    experts: int | None = None,
    vocabulary: int | None = None,
) -> Model:
    """A model of the table in a format; fewer layers, experts or tokens than the real one, as benchmarks make it."""
    decoder_layers, count = layers or shape.layers, experts or shape.experts
    tokens = vocabulary or shape.vocabulary
    parts: dict[str, list[Matrix]] = {part: [] for part in PARTS}
    parts[EMBEDDING].append(Matrix(tokens, shape.hidden))
    if not shape.tied:
        parts[HEAD].append(Matrix(tokens, shape.hidden))
    moe: list[LayerGeometry] = []
    for number in range(decoder_layers):
        for tensor in shape.tensors(shape, number, count):
            if "_exps." not in tensor.name:
                parts[_part_of(tensor)].append(Matrix(math.prod(tensor.shape[:-1]), tensor.shape[-1]))
            elif "ffn_up" in tensor.name:
                spec = ExpertSpec(
                    hidden_size=shape.hidden, intermediate_size=shape.intermediate, activation="silu", format=format
                )
                moe.append(LayerGeometry(count, shape.top_k, spec))
    return Model(
        name,
        format,
        shape.hidden,
        decoder_layers,
        tuple(moe),
        {part: tuple(found) for part, found in parts.items()},
        shape.tied,
        _kv_bytes(shape, decoder_layers),
        _state_bytes(shape, decoder_layers),
    )


def _part_of(tensor: TensorShape) -> str:
    if not tensor.matrix:
        return SMALL
    if any(name in f"{tensor.name}." for name in LATENT_NAMES):
        return LATENT
    if "_shexp" in tensor.name:
        return SHARED
    return DENSE if "ffn_" in tensor.name else ATTENTION


def _kv_bytes(shape: ModelShape, layers: int) -> int:
    """f16 keys and values of one token; only full attention has them, and latent attention one shared row."""
    keys = shape.keys
    if "attention.kv_lora_rank" in keys:
        return 2 * layers * int(keys["attention.kv_lora_rank"] + keys["rope.dimension_count"])
    full = layers // int(keys.get("full_attention_interval", 1))
    return 2 * 2 * full * int(keys["attention.head_count_kv"]) * int(keys["attention.key_length"])


def _state_bytes(shape: ModelShape, layers: int) -> int:
    """f32 state of the linear attention's layers, whose heads have a matrix of keys by values."""
    keys = shape.keys
    linear = layers - layers // int(keys["full_attention_interval"]) if "full_attention_interval" in keys else 0
    return 4 * linear * int(keys["ssm.state_size"] * keys["ssm.inner_size"]) if linear else 0


def _matrix_bytes(matrix: Matrix, format: str) -> int:
    if matrix.stored is not None:
        return matrix.stored
    if format in BLOCKS and format != "fp8_block" and matrix.columns % BLOCKS[format][0]:
        format = "q8_0" if matrix.columns % 32 == 0 else "f32"  # as llama.cpp's quantizer does
    return tensor_bytes(format if format in PLAIN_BYTES or format in BLOCKS else "bf16", matrix.rows, matrix.columns)
