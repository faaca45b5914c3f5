"""A directory of safetensors with random weights of a real model's shape, as other projects' quantizers lay it out.

Codes are random bits under scales that give each matrix a standard deviation of 1/sqrt(columns), as in a GGUF
(random_gguf.py). What such checkpoints leave in bf16 stays so: routers, norms, the table of tokens, the head.
"""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels.formats.quantized import E2M1, FP8_ROWS

from ..checkpoints.architecture import build
from ..checkpoints.directory import SINGLE
from ..checkpoints.gguf.config import read_config
from ..checkpoints.gguf.file import GgufFile, GgufTensor
from ..checkpoints.gguf.formats import TYPES
from ..checkpoints.safetensors_file import DTYPES, StoredTensor
from .random_gguf import metadata

if TYPE_CHECKING:
    from .random_model import RandomModel

_BF16: Final = 30  # ggml's number
_QUANTIZED: Final = re.compile(r"proj(_with_mqa|_qkv|_z)?\.weight")  # not in_proj_a and _b, a number for each head
_INT4_RMS: Final = (sum(code**2 for code in range(-8, 8)) / 16) ** 0.5
_INT8_RMS: Final = (sum(code**2 for code in range(-128, 128)) / 256) ** 0.5

Make = Callable[[np.random.Generator], bytes]


class _Tensor(NamedTuple):
    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    make: Make


class _Layout(NamedTuple):
    """`parts(name, rows, columns)` make up the matrix `name` (without `.weight`); `config` names the method."""

    parts: Callable[[str, int, int], list[_Tensor]]
    config: dict[str, Any]


def write_directory(model: "RandomModel", path: Path) -> None:
    """Writes config.json, a tokenizer and one file of weights. Raises OSError."""
    path.mkdir()
    layout = LAYOUTS[model.format]
    files = {
        tensor.name: GgufTensor(
            tensor.name, TYPES[_BF16], tensor.shape, StoredTensor(path, tensor.name, torch.uint8, (), 0)
        )
        for tensor in model.tensors()
    }
    config = read_config(GgufFile(path, metadata(model), files, ""))
    architecture = build(path, config, torch.bfloat16)
    config.architectures = [type(architecture.model).__name__]
    description = json.loads(config.to_json_string(use_diff=False))
    if layout.config:
        description["quantization_config"] = layout.config
    (path / "config.json").write_text(json.dumps(description))
    _write_tokenizer(path)
    experts = {module.name for module in architecture.experts}
    tied = architecture.model.all_tied_weights_keys
    _write(
        path / SINGLE,
        [
            tensor
            for name, parameter in (*architecture.model.named_parameters(), *_buffers(architecture.model))
            if name not in tied
            for tensor in _tensors(name, tuple(parameter.shape), name.rpartition(".")[0] in experts, layout)
        ],
    )


def _write_tokenizer(path: Path) -> None:
    """Each byte is a token; the model's other tokens are there to be counted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)


def _buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that a checkpoint holds: a router's corrections."""
    kept = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _tensors(name: str, shape: tuple[int, ...], of_experts: bool, layout: _Layout) -> Iterator[_Tensor]:
    if of_experts:  # [experts, gate and up, hidden] or [experts, hidden, intermediate]
        base, _, kind = name.rpartition(".")
        both = kind == "gate_up_proj"
        for expert in range(shape[0]):
            for one in ("gate_proj", "up_proj") if both else ("down_proj",):
                yield from layout.parts(f"{base}.{expert}.{one}", shape[1] // (2 if both else 1), shape[2])
    elif len(shape) == 2 and _QUANTIZED.search(name):
        yield from layout.parts(name.removesuffix(".weight"), *shape)
    else:
        # Norms, and a recurrent layer's rates and steps, are 1.
        make = _all(np.float32(1), "BF16", shape) if len(shape) == 1 else _numbers(shape)
        yield _Tensor(name, "BF16", shape, make)


def _numbers(shape: tuple[int, ...]) -> Make:
    spread = np.float32(shape[-1] ** -0.5)
    return lambda rng: _as(spread * rng.standard_normal(shape, dtype=np.float32), "BF16")


def _all(number: np.generic, dtype: str, shape: tuple[int, ...]) -> Make:
    return lambda _: _as(np.full(shape, number), dtype)


def _bits(nbytes: int) -> Make:
    return lambda rng: rng.integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def _as(numbers: npt.NDArray[Any], dtype: str) -> bytes:
    return torch.from_numpy(numbers).to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()


def _bf16(name: str, rows: int, columns: int) -> list[_Tensor]:
    return [_Tensor(f"{name}.weight", "BF16", (rows, columns), _numbers((rows, columns)))]


def _fp8(name: str, rows: int, columns: int) -> list[_Tensor]:
    every = torch.arange(256, dtype=torch.uint8)
    every[(every & 127) == 127] = 0  # NaN
    rms = every.view(torch.float8_e4m3fn).float().square().mean().sqrt()

    def codes(rng: np.random.Generator) -> bytes:
        return every.numpy()[rng.integers(0, 256, rows * columns, dtype=np.uint8)].tobytes()

    blocks = (-(-rows // FP8_ROWS), -(-columns // FP8_ROWS))
    scale = np.float32(columns**-0.5 / rms)
    return [
        _Tensor(f"{name}.weight", "F8_E4M3", (rows, columns), codes),
        _Tensor(f"{name}.weight_scale_inv", "F32", blocks, _all(scale, "F32", blocks)),
    ]


def _gptq(name: str, rows: int, columns: int, group: int) -> list[_Tensor]:
    groups = columns // group
    scale, eights = np.float32(columns**-0.5 / _INT4_RMS), np.int32(0x77777777)  # stored less 1
    return [
        _Tensor(f"{name}.qweight", "I32", (columns // 8, rows), _bits(columns // 2 * rows)),
        _Tensor(f"{name}.qzeros", "I32", (groups, rows // 8), _all(eights, "I32", (groups, rows // 8))),
        _Tensor(f"{name}.scales", "F16", (groups, rows), _all(scale, "F16", (groups, rows))),
        _Tensor(f"{name}.g_idx", "I32", (columns,), lambda _: _as(np.arange(columns) // group, "I32")),
    ]


def _awq(name: str, rows: int, columns: int, group: int) -> list[_Tensor]:
    groups = columns // group
    scale, eights = np.float32(columns**-0.5 / _INT4_RMS), np.int32(-0x77777778)  # eight times 8
    return [
        _Tensor(f"{name}.qweight", "I32", (columns, rows // 8), _bits(columns // 2 * rows)),
        _Tensor(f"{name}.qzeros", "I32", (groups, rows // 8), _all(eights, "I32", (groups, rows // 8))),
        _Tensor(f"{name}.scales", "F16", (groups, rows), _all(scale, "F16", (groups, rows))),
    ]


def _int8(name: str, rows: int, columns: int) -> list[_Tensor]:
    scale = np.float32(columns**-0.5 / _INT8_RMS)
    return [
        _Tensor(f"{name}.weight", "I8", (rows, columns), _bits(rows * columns)),
        _Tensor(f"{name}.weight_scale", "BF16", (rows, 1), _all(scale, "BF16", (rows, 1))),
    ]


def _words(name: str, rows: int, columns: int, group: int) -> list[_Tensor]:
    groups, scale = columns // group, np.float32(columns**-0.5 / _INT4_RMS)
    return [
        _Tensor(f"{name}.weight_packed", "I32", (rows, columns // 8), _bits(rows * columns // 2)),
        _Tensor(f"{name}.weight_scale", "BF16", (rows, groups), _all(scale, "BF16", (rows, groups))),
        _Tensor(f"{name}.weight_shape", "I64", (2,), lambda _: _as(np.array([rows, columns]), "I64")),
    ]


def _mxfp4(name: str, rows: int, columns: int) -> list[_Tensor]:
    rms = (sum(number**2 for number in E2M1) / len(E2M1)) ** 0.5
    power, shape = np.int64(127 + round(math.log2(columns**-0.5 / rms))), (rows, columns // 32)
    return [
        _Tensor(f"{name}.weight_packed", "U8", (rows, columns // 2), _bits(rows * columns // 2)),
        _Tensor(f"{name}.weight_scale", "U8", shape, _all(power, "U8", shape)),
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


def _words_layout(group: int) -> _Layout:
    weights = {"type": "int", "strategy": "group", "group_size": group}
    return _Layout(partial(_words, group=group), _compressed("pack-quantized", weights))


# By the format that kernels compute in, but for bf16, of which there is a GGUF too, for GPTQ and AWQ, which are
# int4_g128, and for int8, which is q8_0.
LAYOUTS: Final[dict[str, _Layout]] = {
    "bf16_safetensors": _Layout(_bf16, {}),
    "fp8_block": _Layout(
        _fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    ),
    **{f"int4_g{group}": _words_layout(group) for group in (32, 64, 128)},
    "gptq": _Layout(
        partial(_gptq, group=128),
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    ),
    "awq": _Layout(
        partial(_awq, group=128),
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    ),
    "int8": _Layout(_int8, _compressed("int-quantized", {"type": "int", "strategy": "channel", "num_bits": 8})),
    "mxfp4": _Layout(
        _mxfp4,
        _compressed("mxfp4-pack-quantized", {"type": "float", "strategy": "group", "group_size": 32}),
    ),
}


def _write(path: Path, tensors: list[_Tensor]) -> None:
    header, begin = {}, 0
    for tensor in tensors:
        end = begin + math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        for tensor in tensors:
            # Each tensor from its own seed: the file is the same wherever it is made.
            file.write(tensor.make(np.random.Generator(np.random.SFC64(zlib.crc32(tensor.name.encode())))))
        file.flush()
        os.fsync(file.fileno())
