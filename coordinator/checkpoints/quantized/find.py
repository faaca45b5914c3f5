"""The quantized tensors among a checkpoint's, each found by its own names and types, under an ordinary name.

    X.weight, X.weight_scale_inv             FP8 with a scale for each block (DeepSeek-V3, Qwen3.5 FP8)
    X.weight, X.weight_scale                 compressed-tensors: FP8 by tensor, block or row; int8 by row or group
    X.weight_packed, X.weight_scale, ...     compressed-tensors: int4 and int8 in words, MXFP4 in bytes
    X.qweight, X.qzeros, X.scales, X.g_idx   GPTQ, AWQ (`Method.packing`)
    Y_blocks, Y_scales                       gpt-oss: MXFP4, of all experts, without `.weight`

Nothing is read here but headers, and the few bytes of weight_shape: formats follow from shapes and types.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ...types import CoordinatorError
from ..safetensors_file import StoredTensor
from . import layouts
from .method import Method
from .tensor import AnyTensor, QuantizedTensor

_FP8 = torch.float8_e4m3fn
# What belongs to another tensor, and what only kernels that round activations need.
_PARTS = (
    ".qzeros", ".scales", ".g_idx", "_scale_inv", ".weight_scale", ".weight_shape", ".weight_zero_point",
    ".weight_g_idx", ".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
    ".input_zero_point", ".output_zero_point",
)  # fmt: skip


def ordinary_tensors(
    path: Path, stored: dict[str, StoredTensor], method: Method, dtype: torch.dtype
) -> dict[str, AnyTensor]:
    """The checkpoint's tensors under the names that they would have if it were not quantized.

    `dtype` is of numbers that are expanded. Raises CoordinatorError for parts that are missing or don't fit.
    """
    finder = _Finder(path, stored, method, dtype)
    found: dict[str, AnyTensor] = {}
    for name, tensor in stored.items():
        quantized = finder.quantized(name, tensor)
        if quantized is not None:
            found[quantized.name] = quantized
        elif not name.endswith(_PARTS) and not (name.endswith("_scales") and f"{name[:-7]}_blocks" in stored):
            found[name] = tensor
    return found


@dataclass(frozen=True, slots=True)
class _Finder:
    path: Path
    stored: dict[str, StoredTensor]
    method: Method
    dtype: torch.dtype

    def quantized(self, name: str, tensor: StoredTensor) -> QuantizedTensor | None:
        """What the tensor `name` is the codes of; None if it isn't."""
        base = name.rpartition(".")[0]
        if name.endswith(".qweight"):
            read = layouts.OF_WORDS[self.method.packing]
            return read(self._parts(base, "qweight", "qzeros", "scales", "g_idx?"), self.method, self.dtype)
        if name.endswith(".weight_packed"):
            parts = self._parts(
                base, "weight_packed", "weight_scale", "weight_shape?", "weight_zero_point?", "weight_g_idx?"
            )
            return layouts.packed(parts, self.method, self.dtype)
        if name.endswith("_blocks") and f"{name[:-7]}_scales" in self.stored:
            return layouts.mxfp4_stack(name[:-7], tensor, self.stored[f"{name[:-7]}_scales"], self.dtype)
        if tensor.dtype == _FP8:
            scale = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in self.stored), None)
            if scale is None:
                raise CoordinatorError(f"{tensor.path} holds {name} in FP8 without its scales; download it again.")
            return layouts.fp8(name, tensor, self.stored[scale], self.method, self.dtype)
        if tensor.dtype == torch.int8 and f"{name}_scale" in self.stored:
            zeros = self.stored.get(f"{base}.weight_zero_point")
            return layouts.int8(name, tensor, self.stored[f"{name}_scale"], zeros, self.dtype)
        return None

    def _parts(self, base: str, *names: str) -> dict[str, StoredTensor]:
        """The tensors `base`.name by name; those with a question mark may be absent."""
        parts: dict[str, StoredTensor] = {}
        for name in names:
            tensor = self.stored.get(f"{base}.{name.rstrip('?')}")
            if tensor is not None:
                parts[name.rstrip("?")] = tensor
            elif not name.endswith("?"):
                raise CoordinatorError(f"{self.path} lacks {base}.{name}; download the checkpoint again.")
        return parts
