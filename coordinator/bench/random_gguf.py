"""A GGUF with random weights of a real model's shape: it loads in llama.cpp and in Moehive."""

import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..estimate.geometries import VOCABULARY, TensorShape
from .random_blocks import write_tensor
from .random_model import RandomModel

_NARROW = "q8_0"  # of matrices whose columns do not fill a block of the format, as llama.cpp's own quantizer does


def write_gguf(model: RandomModel, path: Path) -> None:
    """Writes the file. Raises OSError."""
    import gguf

    writer = gguf.GGUFWriter(path, model.shape.arch)
    _describe(writer, model)
    tensors = model.tensors()
    for tensor in tensors:
        kind = _format_of(tensor, model.format)
        dtype: Any
        if kind == "f32":
            dtype, shape, nbytes = np.dtype(np.float32), tensor.shape, math.prod(tensor.shape) * 4
            writer.add_tensor_info(tensor.name, shape, dtype, nbytes)
            continue
        quantization = gguf.GGMLQuantizationType[kind.upper()]
        columns, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        row_bytes = tensor.shape[-1] // columns * block_bytes
        nbytes = math.prod(tensor.shape[:-1]) * row_bytes
        stored = (*tensor.shape[:-1], row_bytes)
        writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), nbytes, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    for tensor in tensors:
        # Each tensor from its own seed: the file is the same wherever it is made.
        rng = np.random.Generator(np.random.SFC64(zlib.crc32(tensor.name.encode())))
        writer.write_padding(file, file.tell())
        write_tensor(file, tensor, _format_of(tensor, model.format), rng)
        writer.write_padding(file, file.tell())
    file.flush()
    os.fsync(file.fileno())
    writer.close()


def _format_of(tensor: TensorShape, wanted: str) -> str:
    """What a tensor is stored in."""
    import gguf

    if not tensor.matrix:
        return "f32"
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted.upper()]][0]
    return wanted if tensor.shape[-1] % block == 0 else _NARROW


def _describe(writer: Any, model: RandomModel) -> None:
    writer.add_name(f"random {model.geometry}")
    for key, value in model.metadata().items():
        if key == "general.architecture":  # the writer has it
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    # Every byte is a token, as GPT-2 writes bytes; the others are there to be counted.
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + n) for n in range(256 - len(kept))]
    tokens = [*map(chr, kept), *others]
    tokens += [f"Ġ{n}" for n in range(VOCABULARY - len(tokens) - 1)] + ["<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (VOCABULARY - 1) + [3])
    writer.add_token_merges(["Ġ 0"])
    writer.add_bos_token_id(VOCABULARY - 1)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
