"""The generic trunk: transformers' own model, its routed experts computed elsewhere.

For breadth, not for speed: transformers' layer costs several hundred microseconds in eager mode before any useful
arithmetic. Every family whose experts stand behind transformers' experts interface works, without code of its own.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import bridge, cache_size
from .base import ExpertBackend, NoExperts, SequenceInput, without_waiting
from .half_linear import multiplies_half, widen_products

log = logging.getLogger(__name__)

IMPLEMENTATION = "moehive"  # the name of our function in transformers' experts interface
PREFILL_CHUNK = 512  # tokens; bounds how long one prompt holds the loop, and the memory of its scores
_ORDINAL = "_moehive_layer"  # attribute of an experts module: its MoE layer's ordinal
_PROBE = 8  # tokens run once, whole and in halves, to learn what the cache holds


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
    result = bridge.await_in_forward(bridge.current().experts.submit(layer, hidden, ids, weights))
    return result.reshape(hidden_states.shape).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = _experts_function


@dataclass(slots=True)
class SequenceCache:
    """What one sequence keeps between forward passes. `tokens`: how many have been run."""

    states: Cache | None  # None before the first pass of a family that makes a cache of its own kind
    tokens: int = 0


class GenericTrunk:
    """`models.base.Trunk` over a transformers model whose trunk is loaded and whose experts lie on meta."""

    def __init__(self, model: PreTrainedModel, experts: tuple[Any, ...], family: str, context_length: int) -> None:
        """`experts` are the model's experts modules, in the order of the MoE layers' ordinals.

        Runs a few tokens without experts, to learn the cache's size and whether a prompt may be run in chunks.
        """
        text = model.config.get_text_config(decoder=True)
        self.family = family
        self.max_sequences = 1
        self.cache_room: int | None = None
        self.vocab_size: int = text.vocab_size
        self.context_length = context_length
        self._model: Any = model
        if not multiplies_half():
            widen_products(model)
        self._config = text
        for ordinal, module in enumerate(experts):
            setattr(module, _ORDINAL, ordinal)
            module.config._experts_implementation = IMPLEMENTATION
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._limits_logits = "logits_to_keep" in parameters
        chunks, self._size = self._probe()
        self.prefill_chunk = min(PREFILL_CHUNK, context_length) if chunks else context_length
        if not chunks:
            log.info("%s runs a prompt in one pass: in chunks its logits would differ", family)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of KV cache and recurrent state of a sequence of `tokens`, an upper estimate."""
        return self._size.nbytes(tokens, self.prefill_chunk)

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        own_kind = not self._model._supports_default_dynamic_cache()
        return SequenceCache(None if own_kind else DynamicCache(config=self._config))

    def free_cache(self, cache: SequenceCache) -> None:
        """Lets go of the tensors."""
        cache.states = None

    async def forward(self, batch: Sequence[SequenceInput], experts: ExpertBackend) -> list[torch.Tensor]:
        """One sequence, a batch of one; see `Trunk.forward`."""
        (one,) = batch
        tokens, cache = one.tokens, one.cache
        arguments: dict[str, Any] = {"input_ids": tokens[None], "cache": cache.states, "use_cache": True}
        if self._takes_positions:  # some families would count them wrongly when their first layer is recurrent
            arguments["position_ids"] = torch.arange(cache.tokens, cache.tokens + tokens.shape[0])[None]
        if self._limits_logits and not one.all_logits:
            arguments["logits_to_keep"] = 1
        output = await bridge.run(lambda: self._model(**arguments), experts)
        cache.states = output.cache
        cache.tokens += tokens.shape[0]
        logits: torch.Tensor = output.logits[0]
        return [logits.float() if one.all_logits else logits[-1].float()]

    def _probe(self) -> tuple[bool, cache_size.CacheSize]:
        """Whether chunks give the logits of one pass, and the cache's size. Both are measured with experts of zero.

        Plain keys and values may always be split. Recurrent states may where this family's layers go on from them,
        which shows at once; what picks keys by an indexer shows only in long prompts, so it is never split.
        """
        tokens = torch.arange(3, 3 + _PROBE) % self.vocab_size
        half = _PROBE // 2
        whole, parts = self.new_cache(), self.new_cache()
        expected = self._run_without_experts(SequenceInput(tokens, whole, all_logits=True))[half:]
        self._run_without_experts(SequenceInput(tokens[:half], parts))
        assert parts.states is not None
        earlier = cache_size.measure(parts.states)
        measured = self._run_without_experts(SequenceInput(tokens[half:], parts, all_logits=True))
        size = cache_size.CacheSize(earlier, cache_size.measure(parts.states), half, _PROBE)
        if cache_size.plain(parts.states) or not cache_size.recurrent(parts.states):
            return cache_size.plain(parts.states), size
        spread = (expected - expected.mean()).norm()
        tolerance = 1e-3 if self._model.dtype == torch.float32 else 5e-2  # rounding; a lost state gives about 1
        return bool((measured - expected).norm() <= tolerance * spread), size

    def _run_without_experts(self, one: SequenceInput) -> torch.Tensor:
        return without_waiting(self.forward([one], NoExperts()))[0]
