"""Where a lean trunk's weights come from: a checkpoint's tensors by transformers' parameter names.

A name like `model.layers.3.self_attn.q_proj.weight` means the same tensor whatever file it comes from: a source that
knows other names, another layout or permuted rows (GGUF) translates.
"""

from typing import Protocol

import torch

from moehive.kernels.linear import LinearWeights


class Embedding(Protocol):
    """A table of vectors, one for each token of the vocabulary."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` int64 [T] → f32 [T, hidden]."""
        ...


class TensorSource(Protocol):
    """A checkpoint's tensors, each read when it is asked for. Raises CoordinatorError for one that is not there.

    `dtype` is float32 for a checkpoint in float32, else bfloat16: of the KV cache and of the hidden states that
    travel to the experts.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def __contains__(self, name: str) -> bool: ...

    def linear(self, name: str) -> LinearWeights:
        """The matrix `name` (ending in `.weight`) in its own format, with the bias beside it if there is one."""
        ...

    def column_order(self, name: str) -> torch.Tensor | None:
        """int64 [columns]: where `linear(name)` has each of transformers' columns; None: they are in its order.

        Only DeltaNet's out_proj may be in another, by whole value heads: quantized columns can't be moved.
        """
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Any tensor, as f32: norms, biases, states."""
        ...

    def embedding(self, name: str) -> Embedding:
        """The matrix `name` as a table that is read row by row."""
        ...


class PlainEmbedding:
    """A table in f32, bf16 or f16, [vocabulary, hidden]."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See Embedding."""
        return self._table[ids].float()
