"""The int4 layouts of checkpoints, unpacked into one: what GPTQ, AWQ and compressed-tensors write, number by number.

Each packs eight weights into an int32 and differs from the others in direction, order and zero points. Nothing is
rounded here: `decode` gives exactly the f32 products that the layout means, and the formats int4_g32, int4_g64 and
int4_g128 store the same codes and scales in the order that kernels read.
"""

from dataclasses import dataclass

import torch

from ..geometry import GeometryError

_PER_WORD = 8  # weights of 4 bits in an int32
# Place j of AWQ's int32, lowest bits first, holds column 8 i + _AWQ_ORDER[j] (AutoAWQ, awq/utils/packing_utils.py).
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weights:
    """A projection [rows, columns] = [out, in] of codes 0 to 15; a number is (value - zero) * scale.

    `values` uint8 [rows, columns]; `scales` f32 [rows, groups], which hold 16-bit sources exactly; `zeros` uint8
    [rows, groups], 0 to 15, all 8 for a symmetric source. Group g holds the columns g * group to (g + 1) * group;
    the last may be shorter.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group: int

    def decode(self) -> torch.Tensor:
        """The numbers, f32 [rows, columns]."""
        columns = self.values.shape[1]
        scales = self.scales.repeat_interleave(self.group, dim=1)[:, :columns]
        zeros = self.zeros.repeat_interleave(self.group, dim=1)[:, :columns]
        return (self.values.int() - zeros.int()).float() * scales


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    zeros_are_minus_one: bool = True,
) -> Int4Weights:
    """GPTQ: `qweight` int32 [in / 8, out] packs along the input, `qzeros` int32 [groups, out / 8] along the output.

    `scales` [groups, out] of any float dtype; `g_idx` int32 [in] is the group of each input. The first version of
    the layout stores zero points minus 1, and 15 stands for 0; pass zeros_are_minus_one=False for
    `checkpoint_format: gptq_v2`. Raises GeometryError for shapes that do not fit together, and for inputs out of
    order (`desc_act` without `static_groups`): their groups are scattered over the columns.
    """
    rows_of_words, out = _words(qweight, "qweight")
    columns, groups = rows_of_words * _PER_WORD, scales.shape[0]
    _fits("qzeros", qzeros, (groups, out // _PER_WORD), out % _PER_WORD == 0)
    _fits("scales", scales, (groups, out), groups > 0 and columns % groups == 0)
    group = columns // groups
    if g_idx is not None and not torch.equal(g_idx.long().cpu(), torch.arange(columns) // group):
        raise GeometryError(
            "This GPTQ checkpoint orders its inputs by activation (desc_act), which kernels can't follow; "
            "use one that was quantized with desc_act = false."
        )
    zeros = _unpack(qzeros)
    if zeros_are_minus_one:
        zeros = (zeros + 1) & 15
    return Int4Weights(_unpack(qweight.T).contiguous(), _floats(scales.T), zeros.T.contiguous(), group)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Int4Weights:
    """AWQ (`version: gemm`): `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], along the output.

    `scales` [groups, out] of any float dtype. Raises GeometryError for shapes that do not fit together.
    """
    columns, words = _words(qweight, "qweight")
    out, groups = words * _PER_WORD, scales.shape[0]
    _fits("qzeros", qzeros, (groups, words))
    _fits("scales", scales, (groups, out), groups > 0 and columns % groups == 0)
    place_of = torch.tensor([_AWQ_ORDER.index(j) for j in range(_PER_WORD)])

    def columns_of(packed: torch.Tensor) -> torch.Tensor:
        places = _unpack(packed).view(len(packed), -1, _PER_WORD)
        return places[:, :, place_of].reshape(len(packed), -1).T.contiguous()

    return Int4Weights(columns_of(qweight), _floats(scales.T), columns_of(qzeros), columns // groups)


def from_compressed_tensors(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_shape: tuple[int, int],
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
) -> Int4Weights:
    """compressed-tensors' `pack-quantized`: `weight_packed` int32 [out, ceil(in / 8)] packs along the input.

    `weight_scale` [out, groups] of any float dtype, one group for scales by channel; `weight_shape` is (out, in);
    `weight_zero_point` int32 [ceil(out / 8), groups] packs along the output, absent if symmetric. The signed codes
    are stored plus 8, and so are zero points: hence a symmetric source's zero is 8. Raises GeometryError for shapes
    that do not fit together, and for inputs out of order (`weight_g_idx`, `actorder: group`).
    """
    rows, words = _words(weight_packed, "weight_packed")
    out, columns = weight_shape
    if (rows, words) != (out, -(-columns // _PER_WORD)):
        raise GeometryError(f"weight_packed of shape {[rows, words]} can't hold a matrix of shape {[out, columns]}.")
    groups = weight_scale.shape[-1]
    _fits("weight_scale", weight_scale, (out, groups), groups > 0)
    group = -(-columns // groups)
    if group * groups != columns and group % 32:
        raise GeometryError(f"{columns} columns can't be divided into {groups} groups.")
    if weight_g_idx is not None and not torch.equal(weight_g_idx.long().cpu(), torch.arange(columns) // group):
        raise GeometryError(
            "This checkpoint orders its inputs by activation (actorder: group), which kernels can't follow; "
            "use one that was quantized with actorder: weight, or without."
        )
    if weight_zero_point is None:
        zeros = torch.full((out, groups), 8, dtype=torch.uint8)
    else:
        _fits("weight_zero_point", weight_zero_point, (-(-out // _PER_WORD), groups))
        zeros = _unpack(weight_zero_point.T)[:, :out].T.contiguous()
    values = _unpack(weight_packed)[:, :columns].contiguous()
    return Int4Weights(values, _floats(weight_scale), zeros, group)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, words] → uint8 [n, 8 * words], the lowest 4 bits of each word first."""
    octets = words.contiguous().view(torch.uint8)  # little-endian
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def _floats(scales: torch.Tensor) -> torch.Tensor:
    return scales.float().contiguous()


def _words(packed: torch.Tensor, name: str) -> tuple[int, int]:
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise GeometryError(f"{name} must be a matrix of int32, not {packed.dtype} of shape {list(packed.shape)}.")
    return packed.shape[0], packed.shape[1]


def _fits(name: str, tensor: torch.Tensor, shape: tuple[int, int], divides: bool = True) -> None:
    if not divides or tuple(tensor.shape) != shape:
        raise GeometryError(
            f"{name} of shape {list(tensor.shape)} does not fit the weights; wanted is {list(shape)}."
        )
    if name.startswith(("qzeros", "weight_zero")) and tensor.dtype != torch.int32:
        raise GeometryError(f"{name} must be int32, not {tensor.dtype}.")
