"""From a config to transformers' model on the meta device: no weight exists, every module and name does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ContextManagers

from ..types import CoordinatorError

# What transformers' decorator leaves on each routed-experts module (`use_experts_implementation`).
_EXPERTS_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")

# Names under which routers, blocks and configs keep the number of experts for a token.
_TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")

# Classes of other names generate otherwise (DiffusionGemmaForBlockDiffusion).
_FROM_LEFT_TO_RIGHT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One layer's routed experts in the model: its name there, the module (parameters on meta), and its top-k."""

    name: str
    module: Any  # torch.nn.Module; its attributes are transformers' own
    top_k: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model without weights. `experts` are in the order of the model's modules: the MoE layers' ordinals."""

    family: str  # transformers' model_type
    config: PreTrainedConfig
    dtype: torch.dtype
    model: PreTrainedModel
    experts: tuple[ExpertsModule, ...]


def build(path: Path, config: PreTrainedConfig, dtype: torch.dtype) -> Architecture:
    """The model of `config` on the meta device, as `from_pretrained` would build it.

    Raises CoordinatorError for a family that is not causal, or that has no routed experts behind transformers'
    experts interface.
    """
    family = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise CoordinatorError(f"{path} is an encoder-decoder model ({family}); only decoder models are supported.")
    model_class, config = _model_class(path, config)
    config.dtype = dtype
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            part.dtype = dtype
    try:
        with ContextManagers(model_class.get_init_context(dtype, False, False, None)):
            model = model_class(config)
    except Exception as error:  # sizes that do not fit each other surface here, as whatever torch raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CoordinatorError(f"{path / 'config.json'} does not describe a {family} model: {reason[0]}") from error
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in _EXPERTS_ATTRIBUTES)
    ]
    if not modules:
        if any("expert" in name for name, _ in model.named_modules()):
            raise CoordinatorError(
                f"{path} is of the family {family!r}, whose experts transformers does not separate from the model"
                " (no experts interface), so they cannot be spread over nodes."
            )
        raise CoordinatorError(f"{path} is not a mixture-of-experts model: {family} has no routed experts here.")
    experts = tuple(ExpertsModule(name, module, _top_k(family, model, name, module)) for name, module in modules)
    return Architecture(family, config, dtype, model, experts)


def _model_class(path: Path, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that generates text for a config, and the config that it takes (of a composite, the text part)."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) not in auto._model_mapping:
            continue
        model_class: Any = auto._model_mapping[type(config)]
        if not (model_class.can_generate() and model_class.__name__.endswith(_FROM_LEFT_TO_RIGHT)):
            break
        if model_class.config_class is config.sub_configs.get("text_config"):
            config = config.get_text_config()
        return model_class, config
    raise CoordinatorError(f"{path} is of the family {config.model_type!r}, which is not a causal language model.")


def _top_k(family: str, model: PreTrainedModel, name: str, module: Any) -> int:
    """Experts of a token in one layer: the block beside the experts knows, else its router, else the config."""
    block = model.get_submodule(name.rpartition(".")[0])
    for owner in (block, *(child for child in block.children() if child is not module), module.config):
        for attribute in _TOP_K:
            value = getattr(owner, attribute, None)
            if type(value) is int and value > 0:
                return value
    raise CoordinatorError(f"It is not known how many experts a token of {family} is sent to ({name}).")
