"""One layer's routed experts in a GGUF: three matrices that hold all experts, [experts, out, in].

conversion/qwen.py, deepseek.py, glm.py and llama.py stack them; gpt_oss.py also takes gate and up apart, whose rows
take turns in the original. Some files hold gate and up as one (ffn_gate_up_exps, gate's rows first).
"""

from dataclasses import replace

import torch

from moehive.kernels.blob import pack_blob
from moehive.kernels.geometry import PLAIN_BYTES, ExpertSpec

from ...types import CoordinatorError
from .file import GgufFile, GgufTensor
from .formats import numbers


class LayerExperts:
    """Reads the experts of decoder layer `number` one by one. `spec` has the file's formats."""

    def __init__(self, file: GgufFile, number: int, experts: int, plain: ExpertSpec) -> None:
        """`plain` says what an expert computes, in f32. Raises CoordinatorError for tensors that do not fit."""
        self._file = file
        self._block = f"blk.{number}"
        self._experts = experts
        hidden, inner = plain.hidden_size, plain.intermediate_size
        joined = f"{self._block}.ffn_gate_up_exps.weight"
        self._up = (
            [self._tensor("ffn_gate_up_exps.weight", 2 * inner, hidden)]
            if joined in file.tensors
            else [self._tensor(f"ffn_{part}_exps.weight", inner, hidden) for part in ("gate", "up")]
        )
        self._down = [self._tensor("ffn_down_exps.weight", hidden, inner)]
        self._biases: dict[str, list[GgufTensor]] = {}
        if plain.bias:
            self._biases["up_bias"] = [self._tensor(f"ffn_{part}_exps.bias", inner) for part in ("gate", "up")]
            self._biases["down_bias"] = [self._tensor("ffn_down_exps.bias", hidden)]
        first, last = self._up[0].type, self._up[-1].type
        up = first.format if first == last else "bf16"  # one matrix in our blobs, so in one format
        down = self._down[0].type.format
        self.spec = replace(plain, format=up, down_format=None if down == up else down)
        self.computed_as_stored = first == last and first.name == up and self._down[0].type.name == down

    def blob(self, expert: int) -> torch.Tensor:
        """One expert's blob, uint8 [spec.nbytes]. Raises CoordinatorError when the file can't be read."""
        rows: dict[str, list[torch.Tensor]] = {}
        floats: dict[str, torch.Tensor] = {}
        for place in self.spec.tensors:
            if place.name in self._biases:
                biases = self._biases[place.name]
                floats[place.name] = torch.cat([numbers(t.type, t.rows(expert, expert + 1))[0] for t in biases])
                continue
            sources = self._up if place.name == "up" else self._down
            parts = [_rows_of(tensor, expert) for tensor in sources]
            if place.format in PLAIN_BYTES:
                floats[place.name] = torch.cat([numbers(t.type, r) for t, r in zip(sources, parts, strict=True)])
            else:
                whole = len(parts) == place.matrices
                rows[place.name] = parts if whole else list(torch.cat(parts).chunk(place.matrices))
        return pack_blob(self.spec, rows, floats)

    def _tensor(self, name: str, *shape: int) -> GgufTensor:
        tensor = self._file.tensors.get(f"{self._block}.{name}")
        if tensor is None:
            raise CoordinatorError(f"{self._file.path} lacks {self._block}.{name}; download it again.")
        if tensor.shape != (self._experts, *shape):
            raise CoordinatorError(
                f"{self._file.path} gives {tensor.name} the shape {list(tensor.shape)}, but"
                f" {[self._experts, *shape]} fits its other values; download it again."
            )
        return tensor


def _rows_of(tensor: GgufTensor, expert: int) -> torch.Tensor:
    rows = tensor.shape[1]
    return tensor.rows(expert * rows, (expert + 1) * rows)
