"""How many bytes a sequence's cache takes, before it is allocated: from what a short sequence's cache holds.

Each family stores something else for a token (keys and values, latents, indexer keys, compressed entries) and for a
sequence (recurrent and convolution states). So the trunk measures two short sequences once, and the length's share
follows: keys and values by their shapes, other tensors by how they grew.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

# Only these drop what leaves their window; their subclasses may keep more (DeepSeek-V4's compressed entries).
_WINDOWED = (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer)


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One layer's cache after some tokens. Sizes in bytes."""

    kv_per_token: float  # keys and values of one token
    other: int  # everything else
    window: int | None  # tokens of which keys and values are kept


def measure(states: Cache) -> list[LayerSize]:
    """The sizes of each layer's cache, and last of what the cache keeps outside of its layers."""
    sizes = [_layer(layer) for layer in states.layers]
    outside = sum(
        tensor.nbytes for name, value in vars(states).items() if name != "layers" for tensor in _tensors(value)
    )
    return [*sizes, LayerSize(0.0, outside, None)]


def _layer(layer: Any) -> LayerSize:
    per_token, other = 0.0, 0
    for name, value in vars(layer).items():
        for tensor in _tensors(value):
            if name in ("keys", "values") and tensor.dim() == 4 and tensor.shape[-2]:
                per_token += tensor.nbytes / tensor.shape[-2]
            else:
                other += tensor.nbytes
    return LayerSize(per_token, other, layer.sliding_window if type(layer) in _WINDOWED else None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes of one sequence's cache as a function of its length, an upper estimate."""

    earlier: list[LayerSize]  # after `earlier_tokens`
    later: list[LayerSize]  # after `later_tokens`
    earlier_tokens: int
    later_tokens: int

    def nbytes(self, tokens: int, chunk: int) -> int:
        """Bytes for a sequence of `tokens`, run at most `chunk` at a time: a window also holds its last chunk."""
        total = 0.0
        for earlier, later in zip(self.earlier, self.later, strict=True):
            kept = tokens if later.window is None else min(tokens, later.window - 1 + chunk)
            growth = max(0.0, (later.other - earlier.other) / (self.later_tokens - self.earlier_tokens))
            total += later.kv_per_token * kept + later.other + growth * max(0, tokens - self.later_tokens)
        return round(total)


def plain(states: Cache) -> bool:
    """Whether only keys and values are kept, so that a prompt may be run in chunks without a second thought."""
    return type(states) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in states.layers
    )


def recurrent(states: Cache) -> bool:
    """Whether all that is kept beyond keys and values are the states of recurrent or convolution layers."""
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
        or isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in states.layers
    )
