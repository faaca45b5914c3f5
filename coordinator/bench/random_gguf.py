"""A GGUF with random weights of a real model's shape: it loads in llama.cpp and in Moehive.

Blocks are random bits under scales that give each matrix a standard deviation of 1/sqrt(columns), as trained ones
have roughly: no number in a forward pass becomes infinite, and every weight costs what a real one costs.
"""

import math
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..estimate.geometries import CONTEXT, VOCABULARY, TensorShape

if TYPE_CHECKING:
    from .random_model import RandomModel

# Where a block has its scale and its second scale or offset (f16), by format; the other bits may be anything.
_SCALES: dict[str, tuple[int, int | None]] = {
    "q4_0": (0, None), "q4_1": (0, 2), "q5_0": (0, None), "q5_1": (0, 2), "q8_0": (0, None),
    "q2_k": (80, 82), "q3_k": (108, None), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208, None),
    "iq4_nl": (0, None), "iq4_xs": (0, None),
}  # fmt: skip
GGUF_FORMATS = ("f32", "f16", "bf16", *_SCALES)
_NARROW = "q8_0"  # of matrices whose columns do not fill a block of the format, as llama.cpp's own quantizer does
_PIECE_BLOCKS = 1 << 18  # made and written at once


def write_gguf(model: "RandomModel", path: Path) -> None:
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


def metadata(model: "RandomModel") -> dict[str, Any]:
    """What the file says of the model, by key, but for its tokenizer and its own name."""
    shape = model.shape
    keys: dict[str, Any] = {
        "block_count": model.layers or shape.layers,
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.intermediate,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "expert_count": model.experts or shape.experts,
        "expert_used_count": shape.top_k,
        "expert_feed_forward_length": shape.intermediate,
        **shape.keys,
    }
    return {"general.architecture": shape.arch} | {f"{shape.arch}.{name}": value for name, value in keys.items()}


def _describe(writer: Any, model: "RandomModel") -> None:
    writer.add_name(f"random {model.geometry}")
    for key, value in metadata(model).items():
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
