"""Where a lean trunk's weights come from: a checkpoint's tensors by transformers' parameter names.

A name like `model.layers.3.self_attn.q_proj.weight` means the same tensor whatever file it comes from: a source that
knows other names, another layout or permuted rows (GGUF) translates.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch

from moehive.kernels.linear import LinearWeights
from moehive.kernels.memory import WeightMemory
from moehive.kernels.rows import block_rows


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


class BlockEmbedding:
    """A table in a block format, as kernels compute it."""

    def __init__(self, weights: LinearWeights) -> None:
        self._weights = weights

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See Embedding."""
        return block_rows(self._weights, ids)


def embedding_of(weights: LinearWeights) -> Embedding:
    """A matrix [vocabulary, hidden] as a table; it shares the memory."""
    return PlainEmbedding(weights.stored) if weights.is_plain else BlockEmbedding(weights)


class Replaced:
    """A TensorSource in which some matrices are others; biases are the source's."""

    def __init__(
        self, source: TensorSource, matrices: Mapping[str, LinearWeights], memory: WeightMemory | None = None
    ) -> None:
        """`matrices`, by name, take the place of the source's or stand for what it lacks.

        `memory`: where those that are multiplied with are copied to; None: they are used where they lie.
        """
        self._source = source
        self._matrices = matrices
        self._memory = memory

    @property
    def dtype(self) -> torch.dtype:
        """See TensorSource."""
        return self._source.dtype

    def __contains__(self, name: str) -> bool:
        return name in self._matrices or name in self._source

    def linear(self, name: str) -> LinearWeights:
        """See TensorSource."""
        found = self._matrices.get(name)
        if found is None:
            return self._source.linear(name)
        blob = found.blob
        if self._memory is not None:
            blob = self._memory.take(len(blob))
            blob.copy_(found.blob)
        bias = f"{name.removesuffix('weight')}bias"
        return replace(found, blob=blob, bias=self.tensor(bias) if bias in self else None)

    def column_order(self, name: str) -> torch.Tensor | None:
        """See TensorSource."""
        return None if name in self._matrices else self._source.column_order(name)

    def tensor(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        found = self._matrices.get(name)
        return self._source.tensor(name) if found is None else found.matrix

    def embedding(self, name: str) -> Embedding:
        """See TensorSource."""
        found = self._matrices.get(name)
        return self._source.embedding(name) if found is None else embedding_of(found)
