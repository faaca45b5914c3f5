"""compressed-tensors' weight_shape, where the weights have not been fetched: what follows from the headers.

A packed matrix's own width counts words, so its columns lie beside it as a tensor of two numbers: 16 bytes for each
matrix of the model, ten thousands of them, scattered over its files. The width says the same, unless a row ends
within a word, and then the scales say it.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..safetensors_file import StoredTensor, read_header

_CODES = {torch.int64: "<2q", torch.int32: "<2i"}


def fill_shapes(folder: Path, files: Sequence[Path]) -> None:
    """Writes them into files of headers, beside which config.json lies. Raises CoordinatorError for bad headers."""
    stored: dict[str, StoredTensor] = {}
    for file in files:
        stored |= read_header(file)[0]
    shapes = [tensor for name, tensor in stored.items() if name.endswith(".weight_shape")]
    if not shapes:
        return
    schemes = list(_schemes(json.loads((folder / "config.json").read_bytes())))
    for shape in shapes:
        base = shape.name.removesuffix("_shape")
        words, scale = stored.get(f"{base}_packed"), stored.get(f"{base}_scale")
        if words is None or scale is None or len(words.shape) != 2 or len(scale.shape) != 2:
            continue  # whoever opens it says what is wrong
        rows, width = words.shape
        columns = _columns(width, scale.shape[1], schemes)
        code = _CODES.get(shape.dtype)
        if columns is not None and code is not None and shape.shape == (2,):
            with shape.path.open("r+b") as out:
                out.seek(shape.begin)
                out.write(struct.pack(code, rows, columns))


def _columns(width: int, groups: int, schemes: Sequence[tuple[int, int]]) -> int | None:
    """Of words of 32 bits and scales in a row, by the bits and columns of a group that the config offers."""
    for bits, size in schemes:
        each = 32 // bits
        columns = groups * size if size > 0 else width * each
        if -(-columns // each) == width and (size > 0 or groups == 1):
            return columns
    return next((width * (32 // bits) for bits, _ in schemes), None)


def _schemes(config: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Each group's bits, and how many columns share a scale; -1: all."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            section = part.get(key)
            groups = section.get("config_groups") if isinstance(section, dict) else None
            for group in groups.values() if isinstance(groups, dict) else ():
                weights = group.get("weights") if isinstance(group, dict) else None
                if isinstance(weights, dict) and weights.get("num_bits") in (4, 8):
                    size = weights.get("group_size")
                    yield weights["num_bits"], size if type(size) is int else -1
