"""Matrices with random numbers in safetensors, in the layouts of the projects that quantize models.

Codes are random bits under scales that give each matrix a standard deviation of 1/sqrt(columns), as in a GGUF
(random_blocks.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels.formats.quantized import E2M1, FP8_ROWS

from ..checkpoints.safetensors_file import DTYPES

_INT4_RMS: Final = (sum(code**2 for code in range(-8, 8)) / 16) ** 0.5
_INT8_RMS: Final = (sum(code**2 for code in range(-128, 128)) / 256) ** 0.5

Make = Callable[[np.random.Generator], bytes]


class RandomTensor(NamedTuple):
    """A tensor that `make` makes the bytes of."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    make: Make


class Layout(NamedTuple):
    """`parts(name, rows, columns)` make up the matrix `name` (without `.weight`); `config` names the method."""

    parts: Callable[[str, int, int], list[RandomTensor]]
    config: dict[str, Any]


def normal_numbers(shape: tuple[int, ...]) -> Make:
    """In bf16, around 0, with the standard deviation of a matrix of that shape."""
    spread = np.float32(shape[-1] ** -0.5)
    return lambda rng: _as(spread * rng.standard_normal(shape, dtype=np.float32), "BF16")


def constant(number: np.generic, dtype: str, shape: tuple[int, ...]) -> Make:
    """`number` everywhere; `dtype` is safetensors' name."""
    return lambda _: _as(np.full(shape, number), dtype)


def _bits(nbytes: int) -> Make:
    return lambda rng: rng.integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def _as(numbers: npt.NDArray[Any], dtype: str) -> bytes:
    return torch.from_numpy(numbers).to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()


def _bf16(name: str, rows: int, columns: int) -> list[RandomTensor]:
    return [RandomTensor(f"{name}.weight", "BF16", (rows, columns), normal_numbers((rows, columns)))]


def _fp8(name: str, rows: int, columns: int) -> list[RandomTensor]:
    every = torch.arange(256, dtype=torch.uint8)
    every[(every & 127) == 127] = 0  # NaN
    rms = every.view(torch.float8_e4m3fn).float().square().mean().sqrt()

    def codes(rng: np.random.Generator) -> bytes:
        return every.numpy()[rng.integers(0, 256, rows * columns, dtype=np.uint8)].tobytes()

    blocks = (-(-rows // FP8_ROWS), -(-columns // FP8_ROWS))
    scale = np.float32(columns**-0.5 / rms)
    return [
        RandomTensor(f"{name}.weight", "F8_E4M3", (rows, columns), codes),
        RandomTensor(f"{name}.weight_scale_inv", "F32", blocks, constant(scale, "F32", blocks)),
    ]


def _gptq(name: str, rows: int, columns: int, group: int) -> list[RandomTensor]:
    groups = columns // group
    scale, eights = np.float32(columns**-0.5 / _INT4_RMS), np.int32(0x77777777)  # stored less 1
    return [
        RandomTensor(f"{name}.qweight", "I32", (columns // 8, rows), _bits(columns // 2 * rows)),
        RandomTensor(f"{name}.qzeros", "I32", (groups, rows // 8), constant(eights, "I32", (groups, rows // 8))),
        RandomTensor(f"{name}.scales", "F16", (groups, rows), constant(scale, "F16", (groups, rows))),
        RandomTensor(f"{name}.g_idx", "I32", (columns,), lambda _: _as(np.arange(columns) // group, "I32")),
    ]


def _awq(name: str, rows: int, columns: int, group: int) -> list[RandomTensor]:
    groups = columns // group
    scale, eights = np.float32(columns**-0.5 / _INT4_RMS), np.int32(-0x77777778)  # eight times 8
    return [
        RandomTensor(f"{name}.qweight", "I32", (columns, rows // 8), _bits(columns // 2 * rows)),
        RandomTensor(f"{name}.qzeros", "I32", (groups, rows // 8), constant(eights, "I32", (groups, rows // 8))),
        RandomTensor(f"{name}.scales", "F16", (groups, rows), constant(scale, "F16", (groups, rows))),
    ]


def _int8(name: str, rows: int, columns: int) -> list[RandomTensor]:
    scale = np.float32(columns**-0.5 / _INT8_RMS)
    return [
        RandomTensor(f"{name}.weight", "I8", (rows, columns), _bits(rows * columns)),
        RandomTensor(f"{name}.weight_scale", "BF16", (rows, 1), constant(scale, "BF16", (rows, 1))),
    ]


def _words(name: str, rows: int, columns: int, group: int) -> list[RandomTensor]:
    groups, scale = columns // group, np.float32(columns**-0.5 / _INT4_RMS)
    return [
        RandomTensor(f"{name}.weight_packed", "I32", (rows, columns // 8), _bits(rows * columns // 2)),
        RandomTensor(f"{name}.weight_scale", "BF16", (rows, groups), constant(scale, "BF16", (rows, groups))),
        RandomTensor(f"{name}.weight_shape", "I64", (2,), lambda _: _as(np.array([rows, columns]), "I64")),
    ]


def _mxfp4(name: str, rows: int, columns: int) -> list[RandomTensor]:
    rms = (sum(number**2 for number in E2M1) / len(E2M1)) ** 0.5
    power, shape = np.int64(127 + round(math.log2(columns**-0.5 / rms))), (rows, columns // 32)
    return [
        RandomTensor(f"{name}.weight_packed", "U8", (rows, columns // 2), _bits(rows * columns // 2)),
        RandomTensor(f"{name}.weight_scale", "U8", shape, constant(power, "U8", shape)),
    ]


def _compressed(format: str, weights: dict[str, Any]) -> dict[str, Any]:
    """compressed-tensors' description of one scheme for all linear layers."""
    scheme = {"targets": ["Linear"], "format": format, "weights": {"num_bits": 4, "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def _words_layout(group: int) -> Layout:
    weights = {"type": "int", "strategy": "group", "group_size": group}
    return Layout(partial(_words, group=group), _compressed("pack-quantized", weights))


# By the format that kernels compute in, but for bf16, of which there is a GGUF too, for GPTQ and AWQ, which are
# int4_g128, and for int8, which is q8_0.
LAYOUTS: Final[dict[str, Layout]] = {
    "bf16_safetensors": Layout(_bf16, {}),
    "fp8_block": Layout(
        _fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    ),
    **{f"int4_g{group}": _words_layout(group) for group in (32, 64, 128)},
    "gptq": Layout(
        partial(_gptq, group=128),
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    ),
    "awq": Layout(
        partial(_awq, group=128),
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    ),
    "int8": Layout(_int8, _compressed("int-quantized", {"type": "int", "strategy": "channel", "num_bits": 8})),
    "mxfp4": Layout(
        _mxfp4,
        _compressed("mxfp4-pack-quantized", {"type": "float", "strategy": "group", "group_size": 32}),
    ),
}
