"""The trunk's weights into transformers' model, by transformers' own loader; experts stay on the meta device."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from ..types import CoordinatorError
from .architecture import Architecture
from .quantized.tensor import AnyTensor
from .trunk_tensors import misfit

log = logging.getLogger(__name__)


def load_trunk(path: Path, architecture: Architecture, tensors: dict[str, AnyTensor]) -> None:
    """Fills `architecture.model` with `tensors` (by the checkpoint's names), reading each once into its own memory.

    Afterwards only routed experts lie on the meta device, and the model is in evaluation mode without gradients.
    Rules of transformers hold: what a family keeps in f32, tied weights, buffers that no checkpoint has. Raises
    CoordinatorError when a tensor is missing or does not fit; nothing is initialized at random.
    """
    model = architecture.model
    expert_names = _leave_out_experts(architecture)
    mapping: Any = get_model_conversion_mapping(model)
    load_config = LoadStateDictConfig(
        pretrained_model_name_or_path=str(path),
        dtype=architecture.dtype,
        dtype_plan=model._get_dtype_plan(architecture.dtype),
        weight_mapping=mapping,
    )
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        info, _ = type(model)._load_pretrained_model(model, tensors, None, load_config)
        info.missing_keys -= expert_names
        if info.mismatched_keys:
            name, found, wanted = sorted(info.mismatched_keys)[0]
            raise misfit(path, name, found, wanted)
        if info.conversion_errors:
            name, reason = sorted(info.conversion_errors.items())[0]
            raise CoordinatorError(f"{path}: the tensors of {name} do not fit together ({_last_line(reason)}).")
        missing = sorted(_untied(architecture, info.missing_keys))
        if missing:
            more = "" if len(missing) == 1 else f" and {len(missing) - 1} more"
            raise CoordinatorError(f"{path} lacks the tensor {missing[0]}{more}; download the checkpoint again.")
        if info.unexpected_keys:
            log.info("%d tensors of %s belong to no part of the model", len(info.unexpected_keys), path)
            info.unexpected_keys.clear()
        type(model)._finalize_model_loading(model, load_config, info)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model.eval()
    model.requires_grad_(False)
    _check(path, architecture, expert_names)


def _leave_out_experts(architecture: Architecture) -> set[str]:
    """Marks the experts' parameters as initialized, so that the loader leaves them on meta; their full names."""
    names: set[str] = set()
    for layer in architecture.experts:
        for module in layer.module.modules():
            module._is_hf_initialized = True
        for name, parameter in layer.module.named_parameters():
            parameter._is_hf_initialized = True
            names.add(f"{layer.name}.{name}")
    return names


def _untied(architecture: Architecture, missing: set[str]) -> set[str]:
    """Of the missing tensors, those that no other tensor stands for and that the family cannot do without."""
    model = architecture.model
    tied = model.all_tied_weights_keys
    ignored = tuple(model._keys_to_ignore_on_load_missing or ())
    return {
        name
        for name in missing
        if not (name in tied and tied[name] not in missing) and not any(re.search(p, name) for p in ignored)
    }


def _check(path: Path, architecture: Architecture, expert_names: set[str]) -> None:
    """Nothing of the trunk may have stayed without a value."""
    model = architecture.model
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in expert_names and tensor.device == torch.device("meta"):
            raise CoordinatorError(f"{path} gives no value to {name}; download the checkpoint again.")


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
