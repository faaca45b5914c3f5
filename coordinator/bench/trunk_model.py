"""A random model of a case, as transformers has it and as a lean trunk reads it.

Only the first rows of a large quantized matrix are really quantized, and stand for the others too: times do not
depend on the numbers.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moehive.kernels.blob import empty_blob
from moehive.kernels.formats.plain import PLAIN_TYPES
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import tensor_bytes
from moehive.kernels.linear import LinearWeights

from ..models.tensors import Embedding, PlainEmbedding
from .trunk_cases import Case

_QUANTIZED_ROWS = 128  # whole blocks of every format


def random_model(case: Case) -> Any:
    """transformers' model with random weights, f32 or bf16; its vocabulary is small, for its layers are measured."""
    configs: Any = CONFIG_MAPPING
    config = configs[case.family](vocab_size=256, max_position_embeddings=4096, pad_token_id=0)
    known = config.to_dict()
    for name, value in case.config.items():
        if name in known or name == "head_dim":  # which some families' configs have only if they are told
            setattr(config, name, value)
    if "kv_lora_rank" in known:  # each head has keys of its own, made of the latent
        config.num_key_value_heads = config.num_attention_heads
    if "layer_types" in known:  # the config's own pattern, as long as there are layers
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    dtype = torch.float32 if case.formats == ("f32",) else torch.bfloat16
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def experts_of(model: Any) -> tuple[Any, ...]:
    """The modules of its routed experts, in the layers' order."""
    return tuple(m for m in model.modules() if hasattr(m, "num_experts") and hasattr(m, "is_concatenated"))


class ModelTensors:
    """`models.tensors.TensorSource` of a model's own tensors, its layers' matrices in `format`."""

    def __init__(self, model: Any, format: str) -> None:
        self.dtype: torch.dtype = model.dtype
        self.layer_bytes = 0  # of all layers' matrices
        self._format: Any = format
        self._tensors: dict[str, torch.Tensor] = model.state_dict()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def linear(self, name: str) -> LinearWeights:
        """See TensorSource."""
        numbers = self._tensors[name]
        rows, columns = numbers.shape
        blob = empty_blob(tensor_bytes(self._format, rows, columns))
        some = numbers if self._format in PLAIN_TYPES else numbers[:_QUANTIZED_ROWS]
        first = blob[: tensor_bytes(self._format, len(some), columns)]
        FORMATS[self._format].encode(some.float(), first)
        for start in range(len(first), len(blob), len(first)):
            blob[start : start + len(first)] = first[: len(blob) - start]
        if ".layers." in name:
            self.layer_bytes += len(blob)
        bias = self._tensors.get(f"{name.removesuffix('weight')}bias")
        return LinearWeights(self._format, rows, columns, blob, None if bias is None else bias.float())

    def column_order(self, name: str) -> torch.Tensor | None:
        """See TensorSource."""
        return None

    def tensor(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        return self._tensors[name].float().contiguous()

    def embedding(self, name: str) -> Embedding:
        """See TensorSource."""
        return PlainEmbedding(self._tensors[name])
