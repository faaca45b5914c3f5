"""Formats that store each number by itself: f32, bf16, f16."""

from dataclasses import dataclass
from typing import Final

import torch

PLAIN_TYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """Row after row of little-endian IEEE numbers, no padding between rows, so rows need not be aligned.

        f32   1 sign, 8 exponent, 23 fraction bits; the numbers themselves
        bf16  the upper half of an f32: 1 sign, 8 exponent, 7 fraction bits; f32's range
        f16   1 sign, 5 exponent, 10 fraction bits; largest 65504, subnormals down to 2^-24

    Encoding rounds to nearest, ties to even; a number beyond f16's range becomes infinite, so a source with
    such numbers belongs into bf16. Decoding is exact. Non-goal: scales of any kind.
    """

    name: str
    dtype: torch.dtype

    def encode(self, numbers: torch.Tensor, out: torch.Tensor) -> None:
        self.view(out, tuple(numbers.shape)).copy_(numbers)

    def view(self, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return raw.view(self.dtype).view(shape)

    def decode(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return stored.float()
