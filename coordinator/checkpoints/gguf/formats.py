"""The types of a GGUF's tensors, and what of them becomes: the same bits in the layout that kernels compute in."""

from dataclasses import dataclass
from typing import get_args

import torch

from moehive.kernels.formats.file_rows import FILE_FORMATS, pack_file_rows
from moehive.kernels.formats.plain import PLAIN_TYPES
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import Format


@dataclass(frozen=True, slots=True)
class TensorType:
    """ggml's name of a type, and its blocks: so many numbers in so many bytes."""

    name: str
    block: int
    nbytes: int

    @property
    def format(self) -> Format:
        """Our format of the same bits, or bf16 for a type that kernels do not compute in."""
        rows_of_files = (*PLAIN_TYPES, *FILE_FORMATS)
        return next((known for known in get_args(Format) if known == self.name and known in rows_of_files), "bf16")


# ggml.h, enum ggml_type, with the sizes of ggml-common.h's block structs.
TYPES: dict[int, TensorType] = {
    0: TensorType("f32", 1, 4),
    1: TensorType("f16", 1, 2),
    2: TensorType("q4_0", 32, 18),
    3: TensorType("q4_1", 32, 20),
    6: TensorType("q5_0", 32, 22),
    7: TensorType("q5_1", 32, 24),
    8: TensorType("q8_0", 32, 34),
    10: TensorType("q2_k", 256, 84),
    11: TensorType("q3_k", 256, 110),
    12: TensorType("q4_k", 256, 144),
    13: TensorType("q5_k", 256, 176),
    14: TensorType("q6_k", 256, 210),
    16: TensorType("iq2_xxs", 256, 66),
    17: TensorType("iq2_xs", 256, 74),
    18: TensorType("iq3_xxs", 256, 98),
    19: TensorType("iq1_s", 256, 50),
    20: TensorType("iq4_nl", 32, 18),
    21: TensorType("iq3_s", 256, 110),
    22: TensorType("iq2_s", 256, 82),
    23: TensorType("iq4_xs", 256, 136),
    24: TensorType("i8", 1, 1),
    25: TensorType("i16", 1, 2),
    26: TensorType("i32", 1, 4),
    27: TensorType("i64", 1, 8),
    28: TensorType("f64", 1, 8),
    29: TensorType("iq1_m", 256, 56),
    30: TensorType("bf16", 1, 2),
    34: TensorType("tq1_0", 256, 54),
    35: TensorType("tq2_0", 256, 66),
    39: TensorType("mxfp4", 32, 17),
}


def numbers(kind: TensorType, rows: torch.Tensor) -> torch.Tensor:
    """`rows`, uint8 [n, bytes of a row], as f32 [n, columns]."""
    if kind.name in PLAIN_TYPES:
        return rows.contiguous().view(PLAIN_TYPES[kind.name]).float()
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(rows.contiguous().numpy(), GGMLQuantizationType[kind.name.upper()]))


def encode(kind: TensorType, rows: torch.Tensor, columns: int, format: Format, out: torch.Tensor) -> None:
    """Writes `rows`, uint8 [n, bytes of a row] of `kind`, into `out` (uint8 [tensor_bytes], aligned to 64).

    Where `format` has the same bits as the type, they are only laid out anew; else the numbers are rounded to it.
    """
    if kind.name != format:
        FORMATS[format].encode(numbers(kind, rows), out)
    elif kind.name in PLAIN_TYPES:
        out.view(rows.shape).copy_(rows)
    else:
        pack_file_rows(format, rows, columns, out)
