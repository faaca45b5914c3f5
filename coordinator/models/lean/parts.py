"""What a family's builder gives to the lean trunk."""

from dataclasses import dataclass

import torch

from moehive.kernels.linear import LinearWeights

from ..tensors import Embedding
from .attention import Attention
from .cache import CacheLayout
from .mlp import Mlp
from .rope import Rope


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One decoder layer; norms are f32 [hidden]."""

    attention_norm: torch.Tensor
    attention: Attention
    mlp_norm: torch.Tensor
    mlp: Mlp


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parts:
    """What a family's builder gives."""

    family: str
    context_length: int
    embedding: Embedding
    layers: list[Layer]
    norm: torch.Tensor  # f32 [hidden], after the last layer
    head: LinearWeights
    eps: float  # of all norms over the hidden size
    rope: Rope
    cache: CacheLayout
    dtype: torch.dtype  # of the hidden states that travel to the experts
