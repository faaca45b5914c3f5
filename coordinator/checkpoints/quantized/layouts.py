"""How each method lays a matrix out over stored tensors: shapes are checked when it is found, bytes read later."""

from collections.abc import Callable

import torch

from moehive.kernels.formats.int4_sources import from_awq, from_awq_gemv, from_compressed_tensors, from_gptq
from moehive.kernels.formats.quantized import Mxfp4Weights
from moehive.kernels.geometry import MAX_SIZE, Format

from ...types import CoordinatorError
from ..safetensors_file import StoredTensor
from .matrices import Q8_COLUMNS, Fp8Matrix, Int4Matrix, Int8Matrix, Matrix, Mxfp4Matrix
from .method import Method, Packing
from .tensor import QuantizedTensor

Parts = dict[str, StoredTensor]


def gptq(parts: Parts, method: Method, dtype: torch.dtype) -> QuantizedTensor:
    """GPTQ, see from_gptq. Raises CoordinatorError for shapes that do not fit."""
    words, scales = parts["qweight"], _matrix(parts["scales"])
    rows, columns = _matrix(words)[1], _matrix(words)[0] * 8

    def load(_: int | None) -> Matrix:
        order = parts["g_idx"].read() if "g_idx" in parts else None
        return Int4Matrix(
            from_gptq(
                words.read(),
                parts["qzeros"].read(),
                parts["scales"].read(),
                order,
                zeros=method.zeros,
                ordered=method.ordered,
            )
        )

    scattered = method.ordered and scales[0] > 1
    return _int4(parts, "qweight", (rows, columns), scales[0], dtype, load, scattered)


def awq(parts: Parts, method: Method, dtype: torch.dtype) -> QuantizedTensor:
    """AWQ, see from_awq. Raises CoordinatorError for shapes that do not fit."""
    words, scales = parts["qweight"], _matrix(parts["scales"])
    rows, columns = _matrix(words)[1] * 8, _matrix(words)[0]

    def load(_: int | None) -> Matrix:
        return Int4Matrix(from_awq(words.read(), parts["qzeros"].read(), parts["scales"].read()))

    return _int4(parts, "qweight", (rows, columns), scales[0], dtype, load)


def awq_gemv(parts: Parts, method: Method, dtype: torch.dtype) -> QuantizedTensor:
    """AWQ's other layout, see from_awq_gemv. Raises CoordinatorError for shapes that do not fit."""
    words = parts["qweight"]
    rows, columns = _matrix(words)[0], _matrix(words)[1] * 8
    group = columns if method.group == -1 else method.group

    def load(_: int | None) -> Matrix:
        return Int4Matrix(from_awq_gemv(words.read(), parts["qzeros"].read(), parts["scales"].read(), group))

    return _int4(parts, "qweight", (rows, columns), columns // max(1, group), dtype, load)


OF_WORDS: dict[Packing, Callable[[Parts, Method, torch.dtype], QuantizedTensor]] = {
    "gptq": gptq,
    "awq gemm": awq,
    "awq gemv": awq_gemv,
}


def packed(parts: Parts, method: Method, dtype: torch.dtype) -> QuantizedTensor:
    """compressed-tensors' words of 8 or 4 codes, or bytes of 2 (MXFP4). Raises CoordinatorError for other bits."""
    words, scale = parts["weight_packed"], parts["weight_scale"]
    rows, width = _matrix(words)
    if words.dtype == torch.uint8:
        return _mxfp4_bytes(parts, dtype)
    if "weight_shape" not in parts:
        raise CoordinatorError(f"{words.path} holds {words.name} without its weight_shape; download it again.")
    shape = tuple(int(n) for n in parts["weight_shape"].read().flatten().tolist()) if _small(parts) else ()
    if len(shape) != 2 or shape[0] != rows or not 1 <= shape[1] <= MAX_SIZE * 4:
        raise _wrong(words, f"has the shape {list(shape)[:4]} in {rows} rows")
    columns = shape[1]
    groups = _matrix(scale)[1]
    zeros = parts.get("weight_zero_point")
    order = parts.get("weight_g_idx")

    def load4(_: int | None) -> Matrix:
        return Int4Matrix(
            from_compressed_tensors(
                words.read(),
                scale.read(),
                (rows, columns),
                None if zeros is None else zeros.read(),
                None if order is None else order.read(),
            )
        )

    def load8(_: int | None) -> Matrix:
        codes = _signed_octets(words.read())[:, :columns]
        if zeros is None:
            return Int8Matrix(codes, scale.read().float())
        points = _signed_octets(zeros.read().T.contiguous())[:, :rows].T  # packed along the output
        return Int8Matrix(codes, scale.read().float(), points)

    if width == -(-columns // 8):
        scattered = order is not None and groups > 1  # actorder: group
        return _int4(parts, "weight_packed", (rows, columns), groups, dtype, load4, scattered)
    if width == -(-columns // 4) and order is None and words.dtype == torch.int32:
        if zeros is not None and (zeros.dtype, zeros.shape) != (torch.int32, (-(-rows // 4), groups)):
            raise _wrong(zeros, f"has the shape {list(zeros.shape)} for {rows} rows in {groups} groups")
        format = _int8_format(columns, groups) if zeros is None else None
        return QuantizedTensor(_weight(words), dtype, (rows, columns), format, tuple(parts.values()), load8)
    raise _wrong(words, f"has {width} words a row for {columns} columns, which are not 4 or 8 bits each")


def mxfp4_stack(name: str, blocks: StoredTensor, scales: StoredTensor, dtype: torch.dtype) -> QuantizedTensor:
    """gpt-oss: `blocks` uint8 [experts, out, blocks, 16], `scales` uint8 [experts, out, blocks]; transposed later."""
    shape = blocks.shape
    if (
        len(shape) != 4
        or shape[3] != 16
        or scales.shape != shape[:3]
        or {blocks.dtype, scales.dtype} != {torch.uint8}
    ):
        raise _wrong(blocks, f"has the shape {list(shape)} beside scales of {list(scales.shape)}")
    experts, rows, columns = shape[0], shape[1], shape[2] * 32

    def load(expert: int | None) -> Matrix:
        at = expert or 0
        codes, factors = blocks.read(at, at + 1)[0], scales.read(at, at + 1)[0]
        return Mxfp4Matrix(Mxfp4Weights.of_blocks(codes.flatten(1), factors))

    return QuantizedTensor(name, dtype, (experts, columns, rows), "mxfp4", (blocks, scales), load, transposed=True)


def fp8(name: str, codes: StoredTensor, scale: StoredTensor, method: Method, dtype: torch.dtype) -> QuantizedTensor:
    """FP8 with factors for blocks, rows, or the whole; a matrix or a stack. Raises CoordinatorError."""
    if len(codes.shape) not in (2, 3):
        raise _wrong(codes, f"has {len(codes.shape)} dimensions")
    stack, (rows, columns) = codes.shape[:-2], codes.shape[-2:]
    high, wide = -(-rows // method.block[0]), -(-columns // method.block[1])
    kinds: dict[tuple[int, ...], tuple[int, int]] = {
        (*stack, rows, 1): (1, columns),
        (): (rows, columns),
        (1,): (rows, columns),
        (*stack, 1, 1): (rows, columns),
        (*stack, high, wide): method.block,
    }
    block = kinds.get(scale.shape)
    if block is None:
        raise _wrong(codes, f"of shape {list(codes.shape)} has scales of shape {list(scale.shape)}")

    def load(expert: int | None) -> Matrix:
        alone = expert is None
        numbers = codes.read() if expert is None else codes.read(expert, expert + 1)[0]
        factors = scale.read() if alone or len(scale.shape) < 3 else scale.read(expert or 0, (expert or 0) + 1)[0]
        return Fp8Matrix(numbers, _factors(factors), block)

    single = block == (rows, columns)
    format: Format | None = "fp8_block" if single or block == (128, 128) else None
    return QuantizedTensor(
        name, dtype, codes.shape, format, (codes, scale), load, row_block=1 if single else block[0]
    )


def int8(
    name: str, codes: StoredTensor, scale: StoredTensor, zeros: StoredTensor | None, dtype: torch.dtype
) -> QuantizedTensor:
    """compressed-tensors' int8 with factors for rows or groups of columns. Raises CoordinatorError."""
    rows, columns = _matrix(codes)
    one = scale.shape in ((), (1,))  # for the whole matrix
    groups = 1 if one else _matrix(scale)[1]
    if not one and scale.shape[0] != rows:
        raise _wrong(codes, f"of {rows} rows has scales of shape {list(scale.shape)}")

    def load(_: int | None) -> Matrix:
        factors = _factors(scale.read()).expand(rows, groups)
        offsets = None if zeros is None else zeros.read().view(-1, groups).expand(rows, groups)
        return Int8Matrix(codes.read(), factors, offsets)

    parts = (codes, scale) if zeros is None else (codes, scale, zeros)
    format = _int8_format(columns, groups) if zeros is None else None
    return QuantizedTensor(name, dtype, (rows, columns), format, parts, load)


def _mxfp4_bytes(parts: Parts, dtype: torch.dtype) -> QuantizedTensor:
    words, scale = parts["weight_packed"], parts["weight_scale"]
    rows, width = _matrix(words)
    if scale.dtype != torch.uint8 or scale.shape != (rows, width // 16) or width % 16:
        raise _wrong(words, "is packed in bytes, but not as MXFP4, with a scale for each 32 columns")

    def load(_: int | None) -> Matrix:
        return Mxfp4Matrix(Mxfp4Weights.of_blocks(words.read(), scale.read()))

    return QuantizedTensor(_weight(words), dtype, (rows, width * 2), "mxfp4", (words, scale), load)


def _int4(
    parts: Parts,
    codes: str,
    shape: tuple[int, int],
    groups: int,
    dtype: torch.dtype,
    load: Callable[[int | None], Matrix],
    scattered: bool = False,
) -> QuantizedTensor:
    columns = shape[1]
    group = -(-columns // max(1, groups))
    format: Format | None = None
    if scattered:  # no kernel looks for each column's group
        pass
    elif group >= columns or group % 128 == 0:
        format = "int4_g128"
    elif group % 32 == 0:
        format = "int4_g64" if group % 64 == 0 else "int4_g32"
    words = parts[codes]
    return QuantizedTensor(_weight(words), dtype, shape, format, tuple(parts.values()), load)


def _int8_format(columns: int, groups: int) -> Format | None:
    return "q8_0" if groups == 1 or (columns % groups == 0 and columns // groups % Q8_COLUMNS == 0) else None


def _signed_octets(words: torch.Tensor) -> torch.Tensor:
    """int8 [n, 4 * columns] of words int32 [n, columns], little-endian, of 4 numbers plus 128 each."""
    return (words.view(torch.uint8) ^ 128).view(torch.int8)


def _factors(scales: torch.Tensor) -> torch.Tensor:
    """Scales as f32 [rows, columns]; a byte of E8M0 is a power of two."""
    if scales.dtype == torch.uint8:
        scales = torch.ldexp(torch.ones(()), scales.int() - 127)
    factors = scales.float()
    return factors.view(1, 1) if factors.numel() == 1 else factors


def _weight(words: StoredTensor) -> str:
    return f"{words.name.rpartition('.')[0]}.weight"


def _matrix(tensor: StoredTensor) -> tuple[int, int]:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise _wrong(tensor, f"has the shape {list(tensor.shape)}, not that of a matrix")
    return tensor.shape[0], tensor.shape[1]


def _small(parts: Parts) -> bool:
    return parts["weight_shape"].nbytes <= 64


def _wrong(tensor: StoredTensor, what: str) -> CoordinatorError:
    return CoordinatorError(f"{tensor.path} cannot be read: {tensor.name} {what}.")
