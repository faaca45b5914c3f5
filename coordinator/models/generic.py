"""The generic trunk: transformers' own model, its routed experts computed elsewhere.

For breadth, not for speed: transformers' layer costs several hundred microseconds in eager mode before any useful
arithmetic. Every family whose experts stand behind transformers' experts interface works, without code of its own.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import bridge
from .base import ExpertBackend
from .cache_size import CacheSize

IMPLEMENTATION = "moehive"  # the name of our function in transformers' experts interface
PREFILL_CHUNK = 512  # tokens; bounds how long one prompt holds the loop, and the memory of its scores
_ORDINAL = "_moehive_layer"  # attribute of an experts module: its MoE layer's ordinal


def _experts_function(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Takes the place of an experts module's forward: hands [tokens, hidden] to the pass's backend and waits."""
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    if hidden.dtype not in (torch.float32, torch.bfloat16):
        hidden = hidden.float()
    ids = top_k_index.reshape(hidden.shape[0], -1)
    weights = top_k_weights.reshape(hidden.shape[0], -1)
    layer = getattr(module, _ORDINAL)
    result = bridge.await_in_forward(bridge.current().experts.compute(layer, hidden, ids, weights))
    return result.reshape(hidden_states.shape).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = _experts_function


@dataclass(slots=True)
class SequenceCache:
    """What one sequence keeps between forward passes. `tokens`: how many have been run."""

    states: Cache
    tokens: int = 0


class GenericTrunk:
    """`models.base.Trunk` over a transformers model whose trunk is loaded and whose experts lie on meta."""

    def __init__(
        self, model: PreTrainedModel, experts: tuple[Any, ...], family: str, vocab_size: int, context_length: int
    ) -> None:
        """`experts` are the model's experts modules, in the order of the MoE layers' ordinals."""
        self.family = family
        self.vocab_size = vocab_size
        self.context_length = context_length
        self._model = model
        for ordinal, module in enumerate(experts):
            setattr(module, _ORDINAL, ordinal)
            module.config._experts_implementation = IMPLEMENTATION
        self._config = model.config.get_text_config(decoder=True)
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._limits_logits = "logits_to_keep" in parameters
        self._size = CacheSize(self._config, self._new_states(), model.dtype)
        self.prefill_chunk = context_length if self._size.recurrent else min(PREFILL_CHUNK, context_length)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of KV cache and recurrent state of a sequence of `tokens`; an upper estimate from the config."""
        return self._size.nbytes(tokens)

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        return SequenceCache(self._new_states())

    async def forward(
        self, tokens: torch.Tensor, cache: SequenceCache, experts: ExpertBackend, all_logits: bool = False
    ) -> torch.Tensor:
        """Runs `tokens` [T] (int64) after what `cache` holds; see `Trunk.forward`."""
        arguments: dict[str, Any] = {"input_ids": tokens[None], self._cache_name: cache.states, "use_cache": True}
        if self._limits_logits and not all_logits:
            arguments["logits_to_keep"] = 1
        output = await bridge.run(lambda: self._model(**arguments), experts)
        cache.tokens += tokens.shape[0]
        logits: torch.Tensor = output.logits[0]
        return logits.float() if all_logits else logits[-1].float()

    def _new_states(self) -> Cache:
        return DynamicCache(config=self._config)
