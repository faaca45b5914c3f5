"""Random numbers in GGUF's types, as they lie in a file.

Blocks are random bits under scales that give each matrix a standard deviation of 1/sqrt(columns), as trained ones
have roughly: no number in a forward pass becomes infinite, and every weight costs what a real one costs.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..estimate.geometries import TensorShape

# Where a block has its scale and its second scale or offset (f16), by format; the other bits may be anything.
_SCALES: dict[str, tuple[int, int | None]] = {
    "q4_0": (0, None), "q4_1": (0, 2), "q5_0": (0, None), "q5_1": (0, 2), "q8_0": (0, None),
    "q2_k": (80, 82), "q3_k": (108, None), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208, None),
    "iq4_nl": (0, None), "iq4_xs": (0, None),
}  # fmt: skip
GGUF_FORMATS = ("f32", "f16", "bf16", *_SCALES)
_PIECE_BLOCKS = 1 << 18  # made and written at once


def write_tensor(file: Any, tensor: TensorShape, kind: str, rng: np.random.Generator) -> None:
    """Writes a tensor with random numbers in the GGUF type `kind` to a binary `file`, as it lies in a GGUF."""
    numbers = math.prod(tensor.shape)
    mean, spread = (0.0, tensor.shape[-1] ** -0.5) if tensor.matrix else (tensor.mean, tensor.spread)
    if kind not in _SCALES:
        for start in range(0, numbers, _PIECE_BLOCKS):
            count = min(_PIECE_BLOCKS, numbers - start)
            values = mean + spread * rng.standard_normal(count, dtype=np.float32)
            file.write(_plain(values.astype(np.float32), kind))
        return
    import gguf

    columns, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    place, second = _SCALES[kind]
    scale, offset = _scales(kind, spread)
    blocks = numbers // columns
    for start in range(0, blocks, _PIECE_BLOCKS):
        count = min(_PIECE_BLOCKS, blocks - start)
        piece = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
        _put(piece, place, scale)
        if second is not None:
            _put(piece, second, offset)
        file.write(piece.tobytes())


def _plain(values: npt.NDArray[np.float32], kind: str) -> bytes:
    if kind == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float16 if kind == "f16" else np.float32).tobytes()


def _put(blocks: npt.NDArray[np.uint8], place: int, number: float) -> None:
    """Writes an f16 at byte `place` of every block."""
    blocks[:, place : place + 2] = np.frombuffer(np.float16(number).tobytes(), dtype=np.uint8)


def _scales(kind: str, spread: float) -> tuple[float, float]:
    """A block's scale and second scale by which random bits mean numbers around 0 with `spread`.

    Numbers are linear in both, so two measurements on random blocks say it.
    """
    import gguf

    quantization = gguf.GGMLQuantizationType[kind.upper()]
    place, second = _SCALES[kind]
    blocks = np.random.Generator(np.random.SFC64(0)).integers(
        0, 256, (4096, gguf.GGML_QUANT_SIZES[quantization][1]), dtype=np.uint8
    )

    def numbers(scale: float, offset: float) -> npt.NDArray[np.float32]:
        _put(blocks, place, scale)
        if second is not None:
            _put(blocks, second, offset)
        return gguf.quants.dequantize(blocks, quantization)

    offset = 0.0
    if second is not None:
        offset = -float(numbers(1.0, 0.0).mean()) / float(numbers(0.0, 1.0).mean())
    factor = spread / float(numbers(1.0, offset).std())
    return factor, factor * offset
