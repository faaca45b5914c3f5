"""A safetensors checkpoint's trunk as a lean trunk takes it: tensor by tensor, in the formats that are stored."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from moehive.kernels.geometry import tensor_bytes
from moehive.kernels.linear import LinearWeights
from moehive.kernels.memory import WeightMemory

from ..models.tensors import Embedding, PlainEmbedding
from ..types import CoordinatorError
from .experts import FORMATS
from .quantized.tensor import AnyTensor, QuantizedTensor
from .safetensors_file import StoredTensor


class SafetensorsTrunk:
    """`models.tensors.TensorSource` of a directory of safetensors."""

    def __init__(self, path: Path, dtype: torch.dtype, tensors: Mapping[str, AnyTensor]) -> None:
        """`tensors` by transformers' parameter names; `dtype` is the checkpoint's. `path` is for errors."""
        self.dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self._path = path
        self._tensors = tensors
        self._memory = WeightMemory()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def plain_matrices(self) -> dict[str, str]:
        """The matrices that are stored in f32, bf16 or f16: their names, and those that they have in the files."""
        found = {}
        for name, stored in self._tensors.items():
            if isinstance(stored, StoredTensor) and len(stored.shape) == 2 and stored.dtype in FORMATS:
                found[name] = stored.name
        return found

    def linear(self, name: str) -> LinearWeights:
        """See TensorSource."""
        stored = self._stored(name)
        bias = f"{name.removesuffix('weight')}bias"
        biases = self.tensor(bias) if bias in self else None
        if isinstance(stored, QuantizedTensor) and len(stored.shape) == 2:
            return self._quantized(stored, biases)
        format = FORMATS.get(stored.dtype)
        if format is None or len(stored.shape) != 2 or isinstance(stored, QuantizedTensor):
            raise CoordinatorError(
                f"{self._path} holds {name} as {stored.dtype} {list(stored.shape)}; a matrix of floats is needed."
            )
        blob = self._memory.take(stored.nbytes)
        blob.copy_(stored.read().view(-1).view(torch.uint8))
        return LinearWeights(format, *stored.shape, blob, biases)

    def column_order(self, name: str) -> torch.Tensor | None:
        """See TensorSource."""
        return None

    def tensor(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        stored = self._stored(name)
        return stored.numbers() if isinstance(stored, QuantizedTensor) else stored.read().float().contiguous()

    def embedding(self, name: str) -> Embedding:
        """See TensorSource."""
        return PlainEmbedding(self._stored(name).read())

    def _stored(self, name: str) -> AnyTensor:
        if name not in self:
            raise CoordinatorError(f"{self._path} lacks the tensor {name}; download the checkpoint again.")
        return self._tensors[name]

    def _quantized(self, stored: QuantizedTensor, bias: torch.Tensor | None) -> LinearWeights:
        rows, columns = stored.shape
        if stored.format is not None and not stored.transposed:
            blob = self._memory.take(tensor_bytes(stored.format, rows, columns))
            stored.pack(None, None, stored.format, blob)
            return LinearWeights(stored.format, rows, columns, blob, bias)
        blob = self._memory.take(tensor_bytes("bf16", rows, columns))
        blob.view(torch.bfloat16).view(rows, columns).copy_(stored.numbers())
        return LinearWeights("bf16", rows, columns, blob, bias)


def misfit(path: Path, name: str, found: Sequence[int], wanted: Sequence[int]) -> CoordinatorError:
    """A tensor of the checkpoint in `path` has another shape than its config says."""
    return CoordinatorError(
        f"{path} gives {name} the shape {tuple(found)}, but its config says {tuple(wanted)}; they do not belong "
        "together: download both again."
    )
