"""A checkpoint's config as transformers' own class."""

import math
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from moehive.kernels.geometry import MAX_LAYERS

from ..types import CoordinatorError

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")  # of parts that see or hear, too
# What every number of a model is multiplied with, or divided by.
_FACTORS = ("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "routed_scaling_factor")
# Families that transformers knows under another name: Kimi K2's code is DeepSeek-V3's.
_KNOWN_AS = {"kimi_k2": "deepseek_v3"}


def read_config(path: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    """A directory's config as transformers' own class.

    `raw` is config.json as it is. Raises CoordinatorError for an unknown family, or a config that its family
    refuses.
    """
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise CoordinatorError(f"{path / 'config.json'} names no model_type, so it is not a model's config.")
    _check_layers(path, raw)
    _check_factors(path, raw)
    try:
        if family in _KNOWN_AS:
            same = _KNOWN_AS[family]
            return CONFIG_MAPPING[same].from_dict(raw | {"model_type": same})
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config's class may raise anything for values it does not like
        if family not in CONFIG_MAPPING:
            raise CoordinatorError(
                f"{path} is of the family {family!r}, which this version of transformers does not know."
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CoordinatorError(
            f"{path / 'config.json'} is not a valid {family} config: {reason[-1].strip()}"
        ) from error
    return config


def _check_layers(path: Path, raw: dict[str, Any]) -> None:
    """Raises CoordinatorError for more layers than a model has: each of them is built, if without weights."""
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for name in _LAYERS:
            count = part.get(name)
            if isinstance(count, int | float) and count > MAX_LAYERS:
                raise CoordinatorError(
                    f"{path / 'config.json'} says {name} = {str(count)[:60]}, but a model may have at most "
                    f"{MAX_LAYERS} layers; download it again."
                )


def _check_factors(path: Path, raw: dict[str, Any]) -> None:
    """Raises CoordinatorError for an infinite or negative factor, which no sentence of the model would survive."""
    parts = [raw]  # as deep as a file likes
    while parts:
        for name, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif name in _FACTORS and isinstance(value, int | float) and not (value >= 0 and math.isfinite(value)):
                raise CoordinatorError(
                    f"{path / 'config.json'} says {name} = {str(value)[:60]}, which cannot be; download it again."
                )


def context_length(config: PreTrainedConfig) -> int:
    """Tokens that the model was made for, prompt and answer together."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_sequence_length", "model_max_length", "seq_length"):
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length
    raise CoordinatorError(f"The config of this {config.model_type} model names no max_position_embeddings; add it.")
