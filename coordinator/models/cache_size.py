"""How many bytes a sequence's cache takes: an upper estimate from the config, before anything is allocated."""

from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin


class CacheSize:
    """Bytes of one sequence's cache as a function of its length."""

    def __init__(self, config: Any, states: Cache, dtype: torch.dtype) -> None:
        """`config` is the text model's; `states` an empty cache as the model will use it; `dtype` the model's."""
        self.recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in states.layers)

    def nbytes(self, tokens: int) -> int:
        """Bytes for a sequence of `tokens`."""
        return tokens
