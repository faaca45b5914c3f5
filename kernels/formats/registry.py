"""Every weight format by its name in `ExpertSpec.format`."""

from .base import WeightFormat
from .blocks import BLOCK_FORMATS
from .plain import PLAIN_TYPES, PlainFormat
from .quantized import QUANTIZED_FORMATS

FORMATS: dict[str, WeightFormat] = {
    **{name: PlainFormat(name, dtype) for name, dtype in PLAIN_TYPES.items()},
    **BLOCK_FORMATS,
    **QUANTIZED_FORMATS,
}
