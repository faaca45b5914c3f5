"""The int4 layouts of checkpoints, unpacked into one: what GPTQ, AWQ and compressed-tensors write, number by number.

Each packs eight weights into an int32 and differs from the others in direction, order and zero points. Nothing is
rounded here: `decode` gives exactly the f32 products that the layout means, and the formats int4_g32, int4_g64 and
int4_g128 store the same codes and scales in the order that kernels read.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ..geometry import GeometryError
from .nibbles import PER_WORD, pack_nibbles, turn_nibbles, unpack_nibbles

# How GPTQ's zero points are stored: the layout's second version as they are, the first less 1. auto-round subtracts
# from each (15 stands for 0), GPTQModel from whole words, where a 0 borrows from the next (convert_gptq_v2_to_v1_*).
StoredZeros: TypeAlias = Literal["plain", "less_one", "less_one_by_word"]

_ONES = 0x11111111
# Place j of AWQ's int32, lowest bits first, holds column 8 i + _AWQ_ORDER[j] (AutoAWQ, awq/utils/packing_utils.py).
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weights:
    """A projection [rows, columns] = [out, in] of codes 0 to 15; a number is (code - zero) * scale.

    `words` int32 [rows, ceil(columns / 8)], see nibbles.py, in any strides; `scales` f32 [rows, groups], which hold
    16-bit sources exactly; `zeros` uint8 [rows, groups], 0 to 15, all 8 for a symmetric source. Group g holds the
    columns g * group to (g + 1) * group; the last may be shorter.
    """

    words: torch.Tensor
    columns: int
    scales: torch.Tensor
    zeros: torch.Tensor
    group: int

    @classmethod
    def of_codes(cls, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int) -> "Int4Weights":
        """From `codes` uint8 [rows, columns]."""
        return cls(pack_nibbles(codes), codes.shape[1], scales, zeros, group)

    @property
    def codes(self) -> torch.Tensor:
        """uint8 [rows, columns]."""
        return unpack_nibbles(self.words, self.columns)

    def decode(self) -> torch.Tensor:
        """The numbers, f32 [rows, columns]."""
        scales = self.scales.repeat_interleave(self.group, dim=1)[:, : self.columns]
        zeros = self.zeros.repeat_interleave(self.group, dim=1)[:, : self.columns]
        return (self.codes.int() - zeros.int()).float() * scales


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    zeros: StoredZeros,
    ordered: bool = False,
) -> Int4Weights:
    """GPTQ: `qweight` int32 [in / 8, out] packs along the input, `qzeros` int32 [groups, out / 8] along the output.

    `scales` [groups, out] of any float dtype; `g_idx` int32 [in] is the group of each input. `ordered` (`desc_act`
    without `static_groups`): groups may be scattered over the columns, and what is returned then has a group for each
    column. Raises GeometryError for shapes that do not fit together, groups that are not there, and scattered ones
    that are not expected.
    """
    rows_of_words, out = _words(qweight, "qweight")
    columns, groups = rows_of_words * PER_WORD, scales.shape[0]
    _fits("qzeros", qzeros, (groups, out // PER_WORD), out % PER_WORD == 0)
    _fits("scales", scales, (groups, out), groups > 0 and columns % groups == 0)
    group = columns // groups
    points = unpack_nibbles(qzeros + _ONES if zeros == "less_one_by_word" else qzeros)
    if zeros == "less_one":
        points = (points + 1) & 15
    if g_idx is None or torch.equal(g_idx.long(), torch.arange(columns) // group):
        return Int4Weights(qweight.T, columns, _floats(scales.T), points.T.contiguous(), group)
    if not ordered:
        raise GeometryError("The groups lie out of order (g_idx), though the config says that desc_act is false.")
    at = _groups_of_columns(g_idx, columns, groups)
    return Int4Weights(qweight.T, columns, _floats(scales[at].T), points[at].T.contiguous(), 1)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Int4Weights:
    """AWQ (`version: gemm`): `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], along the output.

    `scales` [groups, out] of any float dtype. Raises GeometryError for shapes that do not fit together.
    """
    columns, words = _words(qweight, "qweight")
    out, groups = words * PER_WORD, scales.shape[0]
    _fits("qzeros", qzeros, (groups, words))
    _fits("scales", scales, (groups, out), groups > 0 and columns % groups == 0)
    place_of = torch.tensor([_AWQ_ORDER.index(j) for j in range(PER_WORD)])

    def words_of(packed: torch.Tensor) -> torch.Tensor:
        """int32 [out, ceil(rows of `packed` / 8)]: rows lie side by side, as GPTQ has them."""
        return turn_nibbles(packed)[:, place_of].transpose(1, 2).flatten(1).T

    zeros = unpack_nibbles(words_of(qzeros), groups)
    return Int4Weights(words_of(qweight), columns, _floats(scales.T), zeros, columns // groups)


def from_awq_gemv(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group: int) -> Int4Weights:
    """AWQ (`version: gemv`): `qweight` int32 [out, in / 8], `qzeros` int32 [out, words], both along the input.

    `scales` [out, 8 * words] of any float dtype; the first in / `group` of these and of the zero points count,
    one for each `group` columns, and the rest is padding. Raises GeometryError for shapes that do not fit together.
    """
    out, words = _words(qweight, "qweight")
    columns, room = words * PER_WORD, qzeros.shape[-1] * PER_WORD
    if group < 1 or columns % group or columns // group > room:
        raise GeometryError(f"{columns} columns can't be in groups of {group} with {room} zero points.")
    _fits("qzeros", qzeros, (out, room // PER_WORD))
    _fits("scales", scales, (out, room))
    groups = columns // group
    return Int4Weights(qweight, columns, _floats(scales[:, :groups]), unpack_nibbles(qzeros, groups), group)


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
    are stored plus 8, and so are zero points: hence a symmetric source's zero is 8. `weight_g_idx` int32 [in] is the
    group of each input (`actorder: group`; a -1 in it: they were never put in order); what is returned with scattered
    groups has a group for each column. Raises GeometryError for shapes that do not fit together and groups that are
    not there.
    """
    rows, words = _words(weight_packed, "weight_packed")
    out, columns = weight_shape
    if (rows, words) != (out, -(-columns // PER_WORD)):
        raise GeometryError(f"weight_packed of shape {[rows, words]} can't hold a matrix of shape {[out, columns]}.")
    groups = weight_scale.shape[-1]
    _fits("weight_scale", weight_scale, (out, groups), groups > 0)
    group = -(-columns // groups)
    if group * groups != columns and group % 32:
        raise GeometryError(f"{columns} columns can't be divided into {groups} groups.")
    if weight_zero_point is None:
        zeros = torch.full((out, groups), 8, dtype=torch.uint8)
    else:
        _fits("weight_zero_point", weight_zero_point, (-(-out // PER_WORD), groups))
        zeros = unpack_nibbles(weight_zero_point.T, out).T.contiguous()
    if weight_g_idx is None or bool((weight_g_idx == -1).any()):
        return Int4Weights(weight_packed, columns, _floats(weight_scale), zeros, group)
    at = _groups_of_columns(weight_g_idx, columns, groups)
    return Int4Weights(weight_packed, columns, _floats(weight_scale[:, at]), zeros[:, at].contiguous(), 1)


def _groups_of_columns(g_idx: torch.Tensor, columns: int, groups: int) -> torch.Tensor:
    at = g_idx.long()
    if at.shape != (columns,) or int(at.min()) < 0 or int(at.max()) >= groups:
        raise GeometryError(f"g_idx must name one of {groups} groups for each of {columns} columns.")
    return at


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
