"""Tiny random checkpoints of the families: how each config is made small. Plain module, importable by path.

    make_checkpoint("mixtral", folder)     # f32, a few hundred kilobytes, always the same weights

`OVERRIDES` has what a family needs beyond `COMMON`; configs ignore what they do not know.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

VOCABULARY = 128

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
}

FAMILIES = sorted(OVERRIDES)


def make_config(family: str) -> Any:
    """A small config of `family`."""
    config_class = CONFIG_MAPPING[family]
    values = COMMON | OVERRIDES.get(family, {})
    if "text_config" in config_class.sub_configs:
        return config_class(text_config=values, **OVERRIDES.get(f"{family}/composite", {}))
    return config_class(**values)


def make_checkpoint(family: str, folder: Path) -> None:
    """Writes a random f32 checkpoint of `family` to `folder`, as `save_pretrained` does; the same weights each time."""
    torch.manual_seed(20)
    config = make_config(family)
    auto = (
        AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    )
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than a fresh initialization, so that routers and logits differ
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
