"""A directory of safetensors with random weights of a real model's shape, as other projects' quantizers lay it out.

What such checkpoints leave in bf16 stays so: routers, norms, the table of tokens, the head.
"""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ..checkpoints.architecture import build
from ..checkpoints.directory import SINGLE
from ..checkpoints.gguf.config import read_config
from ..checkpoints.gguf.file import GgufFile, GgufTensor
from ..checkpoints.gguf.formats import TYPES
from ..checkpoints.safetensors_file import DTYPES, StoredTensor
from .random_layouts import LAYOUTS, Layout, RandomTensor, constant, normal_numbers
from .random_model import RandomModel

_BF16: Final = 30  # ggml's number
_QUANTIZED: Final = re.compile(r"proj(_with_mqa|_qkv|_z)?\.weight")  # not in_proj_a and _b, a number for each head


def write_directory(model: RandomModel, path: Path) -> None:
    """Writes config.json, a tokenizer and one file of weights. Raises OSError."""
    path.mkdir()
    layout = LAYOUTS[model.format]
    files = {
        tensor.name: GgufTensor(
            tensor.name, TYPES[_BF16], tensor.shape, StoredTensor(path, tensor.name, torch.uint8, (), 0)
        )
        for tensor in model.tensors()
    }
    config = read_config(GgufFile(path, model.metadata(), files, ""))
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


def _tensors(name: str, shape: tuple[int, ...], of_experts: bool, layout: Layout) -> Iterator[RandomTensor]:
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
        make = constant(np.float32(1), "BF16", shape) if len(shape) == 1 else normal_numbers(shape)
        yield RandomTensor(name, "BF16", shape, make)


def _write(path: Path, tensors: list[RandomTensor]) -> None:
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
