"""Every weight format by its name in `ExpertSpec.format`."""

import torch

from .base import WeightFormat
from .blocks import BLOCK_FORMATS
from .plain import PlainFormat
from .quantized import QUANTIZED_FORMATS

FORMATS: dict[str, WeightFormat] = {
    "f32": PlainFormat("f32", torch.float32),
    "bf16": PlainFormat("bf16", torch.bfloat16),
    "f16": PlainFormat("f16", torch.float16),
    **BLOCK_FORMATS,
    **QUANTIZED_FORMATS,
}
