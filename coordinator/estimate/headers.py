"""A model for an estimate from a checkpoint's headers, or from a config alone: no weight is read.

Only what is not in the table of shapes comes here. Imports of torch and transformers wait until then.
"""

import json
import math
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moehive.kernels.geometry import ExpertSpec, Format, LayerGeometry

from ..types import CoordinatorError
from .model import ATTENTION, DENSE, EMBEDDING, HEAD, PARTS, SHARED, SMALL, Matrix, Model

if TYPE_CHECKING:
    from ..checkpoints.opening import ModelSource

STORED = "as stored"


def of_files(model: str) -> Model:
    """A directory of safetensors, a GGUF file or a pack, in the formats that it has. Raises CoordinatorError."""
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
    return _model(source.manifest.name, _format_of(source), source.config, source.manifest.layers, stored)


def of_config(directory: Path, name: str) -> Model:
    """The model that a directory's config.json describes, in bf16. Raises CoordinatorError."""
    import torch

    from ..checkpoints import architecture as arch
    from ..checkpoints.config import read_config
    from ..checkpoints.experts import layout_of

    try:
        raw: Any = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CoordinatorError(f"{directory / 'config.json'} can't be read: {error}.") from error
    if not isinstance(raw, dict):
        raise CoordinatorError(f"{directory / 'config.json'} must hold a JSON object.")
    config = read_config(directory, raw)
    architecture = arch.build(directory, config, torch.bfloat16)
    layers = tuple(
        LayerGeometry(
            layer.module.num_experts, layer.top_k, layout_of(architecture.family, layer, torch.bfloat16).spec
        )
        for layer in architecture.experts
    )
    experts = tuple(f"{layer.name}." for layer in architecture.experts)
    tied = architecture.model.all_tied_weights_keys
    stored = (
        (key, tuple(tensor.shape), tensor.nbytes)
        for key, tensor in architecture.model.named_parameters()
        if not key.startswith(experts) and key not in tied
    )
    return _model(name, "bf16", config, layers, stored)


def download_config(model: str) -> Path:
    """The directory that holds a hub model's config.json, and nothing else is downloaded. Raises CoordinatorError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CoordinatorError(
            f"{model} is no file or directory here, no model of the built-in table, and its config.json can't be had "
            "from the hub; check the name and the network."
        ) from error


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
