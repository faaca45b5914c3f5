"""A GGUF's trunk as a lean trunk takes it: transformers' names, rows in transformers' order, the file's own bits."""

from typing import Any

import torch

from moehive.kernels.formats.file_rows import FILE_FORMATS
from moehive.kernels.geometry import tensor_bytes
from moehive.kernels.linear import LinearWeights
from moehive.kernels.memory import WeightMemory
from moehive.kernels.rows import file_rows

from ...models.tensors import Embedding
from ...types import CoordinatorError
from .file import GgufFile, GgufTensor
from .formats import TensorType, encode, numbers
from .names import column_order, gguf_name, row_order

# Families whose norms are stored as the difference from 1; llama.cpp's converter adds it (conversion/qwen.py:
# `data_torch + 1` for names that end in norm.weight, but not linear_attn.norm.weight).
_ZERO_CENTRED = ("qwen3_next", "qwen3_5_moe_text")


# Matrices that newer files hold in two parts.
_SPLIT = {
    ".ssm_in.": (".attn_qkv.", ".attn_gate."),
    ".attn_kv_b.": (".attn_k_b.", ".attn_v_b."),
}


class GgufTrunk:
    """`models.tensors.TensorSource` over a GGUF file."""

    def __init__(self, file: GgufFile, config: Any) -> None:
        """`config` is what `read_config` made of the file."""
        self._file = file
        self._config = config
        self._memory = WeightMemory()
        self._family: str = config.model_type
        self.dtype = dtype_of(config)

    def __contains__(self, name: str) -> bool:
        return bool(self._found(name))

    def linear(self, name: str) -> LinearWeights:
        """See TensorSource."""
        kind, rows, shape = self._matrix(name)
        format = kind.format
        blob = self._memory.take(tensor_bytes(format, *shape))
        encode(kind, rows, shape[1], format, blob)
        bias = f"{name.removesuffix('weight')}bias"
        return LinearWeights(format, *shape, blob, self.tensor(bias) if bias in self else None)

    def column_order(self, name: str) -> torch.Tensor | None:
        """See TensorSource."""
        return column_order(self._config, name)

    def tensor(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        if name.endswith(".kv_b_proj.weight") and len(self._found(name)) == 2:
            return self._latent_up(name)
        if name.endswith(".weight") and name.split(".")[-2] in _MATRICES:
            kind, rows, shape = self._matrix(name)
            value = numbers(kind, rows).view(shape)
            columns = column_order(self._config, name)
            return value if columns is None else value[:, columns].contiguous()
        value = self._numbers(self._one(name))
        order = row_order(self._config, name)
        if order is not None:
            value = value[_fits(self._file, name, order, len(value))]
        if name.endswith(".A_log"):
            return torch.log(-value)  # stored as -exp(A_log)
        if name.endswith(".conv1d.weight"):
            return value.unsqueeze(1).contiguous()  # stored without the dimension of one
        if self._family in _ZERO_CENTRED and name.endswith("norm.weight") and ".linear_attn." not in name:
            return value - 1.0
        return value.contiguous()

    def embedding(self, name: str) -> Embedding:
        """See TensorSource; the table stays in the file."""
        return _Table(self._one(name))

    def _found(self, name: str) -> list[GgufTensor]:
        """The tensors that `name` is made of; none if it is not there."""
        tensors, stored = self._file.tensors, gguf_name(self._family, name)
        if stored is None:
            return []
        if stored in tensors:
            return [tensors[stored]]
        for whole, parts in _SPLIT.items():
            names = [stored.replace(whole, part) for part in parts]
            if whole in stored and all(each in tensors for each in names):
                return [tensors[each] for each in names]
        return []

    def _one(self, name: str) -> GgufTensor:
        found = self._found(name)
        if len(found) != 1:
            raise CoordinatorError(
                f"{self._file.path} lacks {gguf_name(self._family, name) or name}; download it again."
            )
        return found[0]

    def _numbers(self, tensor: GgufTensor) -> torch.Tensor:
        return numbers(tensor.type, tensor.rows()).view(tensor.shape)

    def _matrix(self, name: str) -> tuple[TensorType, torch.Tensor, tuple[int, int]]:
        """The bytes of a matrix's rows in transformers' order, and its shape."""
        found = self._found(name)
        if not found:
            self._one(name)
        kind = found[0].type
        if len({tensor.type for tensor in found}) > 1:  # only what was one matrix before the converter split it
            kind = TensorType("bf16", 1, 2)
            rows = torch.cat([self._numbers(tensor) for tensor in found]).to(torch.bfloat16).view(torch.uint8)
        else:
            rows = torch.cat([t.rows() for t in found]) if len(found) > 1 else found[0].rows()
        order = row_order(self._config, name)
        if order is not None and not (len(found) == 1 and name.endswith(".in_proj_qkvz.weight")):
            rows = rows[_fits(self._file, name, order, len(rows))]
        return kind, rows, (len(rows), found[0].shape[-1])

    def _latent_up(self, name: str) -> torch.Tensor:
        """kv_b_proj from k_b [heads, rank, nope] and v_b [heads, value, rank] (conversion/deepseek.py)."""
        key, value = (self._numbers(tensor) for tensor in self._found(name))
        if key.dim() != 3 or value.dim() != 3:
            raise CoordinatorError(f"{self._file.path} holds {name} in another layout; convert the model again.")
        return torch.cat([key.transpose(1, 2), value], 1).flatten(0, 1).contiguous()


def dtype_of(config: Any) -> torch.dtype:
    """f32 for a file whose table of tokens is in f32, else bf16."""
    return torch.float32 if config.dtype == torch.float32 else torch.bfloat16


# The last part but one of the names of matrices.
_MATRICES = {
    *(
        "embed_tokens",
        "lm_head",
        "gate",
        "router",
        "shared_expert_gate",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
    ),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "kv_b_proj"),
    *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj_ba", "in_proj_qkvz"),
}


class _Table:
    """A table of tokens' vectors whose rows are read from a mapping of the file."""

    def __init__(self, tensor: GgufTensor) -> None:
        stored = tensor.stored
        self._type = tensor.type
        self._columns = tensor.shape[-1]
        whole = torch.from_file(str(stored.path), size=stored.begin + stored.nbytes, dtype=torch.uint8)
        self._rows = whole[stored.begin :].view(stored.shape)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """See Embedding."""
        if self._type.name in FILE_FORMATS:
            return file_rows(self._type.format, self._rows, self._columns, ids)
        return numbers(self._type, self._rows[ids])


def _fits(file: GgufFile, name: str, order: torch.Tensor, rows: int) -> torch.Tensor:
    if len(order) != rows:
        raise CoordinatorError(
            f"{file.path} gives {name} {rows} rows, but {len(order)} are wanted; download it again."
        )
    return order
