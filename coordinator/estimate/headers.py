"""A model for an estimate from a checkpoint's headers, here or on a hub: no weight is read.

What the table of shapes has needs none of this, so imports of torch and transformers wait.
"""

import math
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from moehive.kernels.geometry import ExpertSpec, Format, LayerGeometry

from ..types import CoordinatorError
from .model import ATTENTION, DENSE, EMBEDDING, HEAD, LATENT, LATENT_NAMES, PARTS, SHARED, SMALL, Matrix, Model

if TYPE_CHECKING:
    from ..checkpoints.opening import ModelSource

STORED = "as stored"


def of_files(model: str, name: str | None = None) -> Model:
    """A directory of safetensors, a GGUF file or a pack, in the formats that it has. Raises CoordinatorError.

    `name` is the model's name for people, its own by default.
    """
    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.opening import open_model, trunk_of
    from ..checkpoints.pack.checkpoint import PackCheckpoint

    source = open_model(model)
    trunk = trunk_of(source)
    stored: Iterable[tuple[str, tuple[int, ...], int]]
    if isinstance(trunk, Checkpoint):
        stored = ((name, tensor.shape, tensor.nbytes) for name, tensor in trunk.trunk_stored().items())
    else:
        stored = ((tensor.name, tensor.shape, tensor.stored.nbytes) for tensor in trunk.trunk_stored())
    own = source.pack.matrices if isinstance(source, PackCheckpoint) else ()
    stored = chain(stored, ((one.name, (one.rows, one.columns), one.nbytes) for one in own))
    return _model(name or source.manifest.name, _format_of(source), source.config, source.manifest.layers, stored)


def of_hub(model: str) -> Model:
    """A hub's model, of which headers alone are fetched; of one in the hub's cache they are read there, offline.

    Raises CoordinatorError, also if the hub can't be reached and nothing is cached.
    """
    from ..checkpoints.hub import cached, in_words, listing, parse_id

    wanted = parse_id(model)
    if wanted is None:
        raise CoordinatorError(
            f"{model} is no file or directory here, no model of the built-in table, and no hub id like"
            " organization/name."
        )
    with in_words(wanted.repository):
        found = listing(wanted)
    if found is None:
        return of_files(str(cached(wanted)), model)
    from ..checkpoints.hub_headers import fetch_headers

    with TemporaryDirectory(prefix="moehive-") as made:
        folder = Path(made) / wanted.repository
        try:
            return of_files(str(fetch_headers(wanted, found, folder)), model)
        except CoordinatorError as error:  # which speaks of the files as the hub names them
            raise CoordinatorError(str(error).replace(f"{made}/", "")) from error


def _model(
    name: str,
    format: str,
    config: Any,
    layers: tuple[LayerGeometry, ...],
    stored: Iterable[tuple[str, tuple[int, ...], int]],
) -> Model:
    text = config.get_text_config(decoder=True)
    parts: dict[str, list[Matrix]] = {part: [] for part in PARTS}
    for key, shape, nbytes in stored:
        rows = 1
        for size in shape[:-1]:
            rows *= size
        parts[_part_of(key, shape)].append(Matrix(rows, shape[-1] if shape else 1, nbytes))
    return Model(
        name,
        format,
        int(text.hidden_size),
        int(text.num_hidden_layers),
        layers,
        {part: tuple(found) for part, found in parts.items()},
        not parts[HEAD],
        _kv_bytes(text),
        _state_bytes(text),
    )


def _part_of(name: str, shape: tuple[int, ...]) -> str:
    if "embed_tokens" in name or name.startswith("token_embd"):
        return EMBEDDING
    if name.startswith(("lm_head", "output.")):
        return HEAD
    if (
        len(shape) < 2
        or "norm" in name
        or "ffn_gate_inp" in name
        or name.endswith((".gate.weight", ".router.weight"))
    ):
        return SMALL
    if any(latent in f"{name}." for latent in LATENT_NAMES):
        return LATENT
    if "_shexp" in name or "shared_expert" in name or "shared_mlp" in name:
        return SHARED
    return DENSE if "mlp" in name or "ffn_" in name or "expert" in name else ATTENTION


def _kv_bytes(text: Any) -> int:
    layers = int(text.num_hidden_layers)
    rank = getattr(text, "kv_lora_rank", None)
    if rank:
        return 2 * layers * int(rank + text.qk_rope_head_dim)
    kinds = getattr(text, "layer_types", None) or ()
    full = sum(kind != "linear_attention" for kind in kinds) if kinds else layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * 2 * full * int(heads) * int(size)


def _state_bytes(text: Any) -> int:
    """f32 state of the layers of linear attention (Qwen3-Next, Qwen3.5); 0 where there are none."""
    linear = [kind for kind in getattr(text, "layer_types", None) or () if kind == "linear_attention"]
    sizes = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    return 4 * len(linear) * math.prod(int(getattr(text, name, 0)) for name in sizes)


def _format_of(source: "ModelSource") -> str:
    """One name for all experts' formats, if there is one."""
    found: set[Format] = set()
    for layer in source.manifest.layers:
        specs: Iterable[ExpertSpec] = {layer.spec_of(expert) for expert in range(layer.experts)}
        found |= {fmt for spec in specs for fmt in (spec.format, spec.back_format)}
    return found.pop() if len(found) == 1 else STORED
