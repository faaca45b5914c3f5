"""A safetensors checkpoint's trunk as a lean trunk takes it: tensor by tensor, in the formats that are stored."""

from pathlib import Path

import torch

from moehive.kernels.blob import empty_blob
from moehive.kernels.linear import LinearWeights

from ..models.tensors import Embedding, PlainEmbedding
from ..types import CoordinatorError
from .conversion import Source
from .experts import FORMATS
from .safetensors_file import StoredTensor


class SafetensorsTrunk:
    """`models.tensors.TensorSource` of a checkpoint in f32, bf16 or f16."""

    def __init__(self, path: Path, dtype: torch.dtype, sources: dict[str, Source]) -> None:
        """`sources` by transformers' parameter names; `dtype` is the checkpoint's. `path` is for errors."""
        self.dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self._path = path
        self._sources = sources

    def __contains__(self, name: str) -> bool:
        source = self._sources.get(name)
        return source is not None and source.converter is None

    def linear(self, name: str) -> LinearWeights:
        """See TensorSource."""
        stored = self._stored(name)
        format = FORMATS.get(stored.dtype)
        if format is None or len(stored.shape) != 2:
            raise CoordinatorError(
                f"{self._path} holds {name} as {stored.dtype} {list(stored.shape)}; a matrix of floats is needed."
            )
        blob = empty_blob(stored.nbytes)
        blob.copy_(stored.read().view(-1).view(torch.uint8))
        bias = f"{name.removesuffix('weight')}bias"
        return LinearWeights(format, *stored.shape, blob, self.tensor(bias) if bias in self else None)

    def column_order(self, name: str) -> torch.Tensor | None:
        """See TensorSource."""
        return None

    def tensor(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        return self._stored(name).read().float().contiguous()

    def embedding(self, name: str) -> Embedding:
        """See TensorSource."""
        return PlainEmbedding(self._stored(name).read())

    def _stored(self, name: str) -> StoredTensor:
        if name not in self:
            raise CoordinatorError(f"{self._path} lacks the tensor {name}; download the checkpoint again.")
        return self._sources[name].tensors[""][0]
