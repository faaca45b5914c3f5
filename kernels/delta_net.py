"""The door to a Gated DeltaNet layer on the CPU: everything between its projections, for a batch of sequences.

Convolution, recurrence and gated norm are one native call (kernels/cpu/delta_net.cc). A sequence's state is two
tensors that the call updates in place: the last inputs of the convolution, and one matrix for each value head.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .library import NativeLibraryError
from .trunk_ops import TrunkOps, check_numbers, native_trunk

_BLOCK = 16  # values of a head that lie together in its state
MAX_TAPS, MAX_KEY_DIM = 8, 256  # what the native library has room for


class _DeltaNet(ctypes.Structure):
    """MoehiveDeltaNet of kernels/cpu/delta_net.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("key_heads", "value_heads", "key_dim", "value_dim")),
        *((name, ctypes.c_int64) for name in ("taps", "row", "segments")),
        *((name, ctypes.c_void_p) for name in ("channels", "z", "b", "a", "to")),
        *((name, ctypes.c_void_p) for name in ("conv", "decay", "dt_bias", "norm")),
        ("norm_eps", ctypes.c_float),
    )


class _Call(ctypes.Structure):
    """MoehiveDeltaNetCall of kernels/cpu/delta_net.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "sequences")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("conv", "recurrent", "mixed", "out")),
    )


@dataclass(frozen=True, slots=True)
class DeltaNetState:
    """What one layer keeps of one sequence, both f32 and zero at first."""

    conv: torch.Tensor  # [taps - 1, channels]: the last inputs, the oldest first
    recurrent: torch.Tensor  # [value_heads, blocks of 16 values, key_dim, 16]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaNetLayer:
    """One layer's shapes and small weights. A row of its input holds what the projections give for one token.

    With `grouped`, the row is Qwen3-Next's: for each key head its query, its key, its value heads' values, their
    gates z; then for each key head its value heads' b, then their a. Else it is Qwen3.5's: all queries, keys,
    values, then z, b, a of all value heads.
    """

    key_heads: int
    value_heads: int
    key_dim: int  # of one head
    value_dim: int
    grouped: bool
    conv: torch.Tensor  # f32 [taps, channels]
    decay: torch.Tensor  # f32 [value_heads]: -exp(A_log)
    dt_bias: torch.Tensor  # f32 [value_heads]
    norm: torch.Tensor  # f32 [value_dim]
    norm_eps: float
    out_order: tuple[int, ...] | None = None  # at which place each value head's output lies; None: as they are

    def __post_init__(self) -> None:
        """Raises GeometryError."""
        check_numbers("convolution", self.conv, len(self.conv) * self.channels)
        check_numbers("decay", self.decay, self.value_heads)
        check_numbers("dt_bias", self.dt_bias, self.value_heads)
        check_numbers("recurrent norm", self.norm, self.value_dim)

    @property
    def channels(self) -> int:
        """Channels of the convolution: all queries, all keys, all values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def row(self) -> int:
        """Numbers in a row of the input."""
        return self.channels + self.value_heads * (self.value_dim + 2)

    @property
    def conv_shape(self) -> tuple[int, int]:
        """Of DeltaNetState.conv."""
        return len(self.conv) - 1, self.channels

    @property
    def recurrent_shape(self) -> tuple[int, int, int, int]:
        """Of DeltaNetState.recurrent."""
        return self.value_heads, -(-self.value_dim // _BLOCK), self.key_dim, _BLOCK


def row_places(layer: DeltaNetLayer) -> tuple[list[int], list[int], list[int], list[int]]:
    """Where a row holds the convolution's channels (start, first channel, count), z, b and a of each value head."""
    heads, share = layer.value_heads, layer.value_heads // layer.key_heads
    keys, values, width = layer.key_heads * layer.key_dim, heads * layer.value_dim, share * layer.value_dim
    if not layer.grouped:
        z = layer.channels
        b = z + values
        return (
            [0, 0, layer.channels],
            [z + head * layer.value_dim for head in range(heads)],
            list(range(b, b + heads)),
            list(range(b + heads, b + 2 * heads)),
        )
    channels, z_places = [], []
    group_row = 2 * layer.key_dim + 2 * width
    for group in range(layer.key_heads):
        start = group * group_row
        channels += [start, group * layer.key_dim, layer.key_dim]
        channels += [start + layer.key_dim, keys + group * layer.key_dim, layer.key_dim]
        channels += [start + 2 * layer.key_dim, 2 * keys + group * width, width]
        z_places += [start + 2 * layer.key_dim + width + i * layer.value_dim for i in range(share)]
    start = layer.key_heads * group_row
    b_places = [start + head // share * 2 * share + head % share for head in range(heads)]
    return channels, z_places, b_places, [place + share for place in b_places]


class DeltaNet:
    """A layer ready to compute; keeps its tensors alive."""

    def __init__(self, ops: TrunkOps, layer: DeltaNetLayer) -> None:
        """Raises NativeLibraryError if the shapes are larger than what the native library has room for."""
        self.layer = layer
        self._ops = ops  # whose handle is used
        library = native_trunk()
        self._run = library.moehive_trunk_delta_net
        self._run.argtypes = (ctypes.c_void_p,) * 3
        self._run.restype = ctypes.c_int32
        if layer.key_dim > MAX_KEY_DIM or not 2 <= len(layer.conv) <= MAX_TAPS:
            raise NativeLibraryError(
                f"A DeltaNet layer with heads of {layer.key_dim} keys and {len(layer.conv)} taps is not supported; "
                f"at most {MAX_KEY_DIM} and {MAX_TAPS} are."
            )
        channels, z, b, a = row_places(layer)
        to = [place * layer.value_dim for place in layer.out_order or range(layer.value_heads)]
        self._kept = [(ctypes.c_int64 * len(places))(*places) for places in (channels, z, b, a, to)]
        self.structure = _DeltaNet(
            key_heads=layer.key_heads,
            value_heads=layer.value_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            taps=len(layer.conv),
            row=layer.row,
            segments=len(channels) // 3,
            channels=ctypes.addressof(self._kept[0]),
            z=ctypes.addressof(self._kept[1]),
            b=ctypes.addressof(self._kept[2]),
            a=ctypes.addressof(self._kept[3]),
            to=ctypes.addressof(self._kept[4]),
            conv=layer.conv.data_ptr(),
            decay=layer.decay.data_ptr(),
            dt_bias=layer.dt_bias.data_ptr(),
            norm=layer.norm.data_ptr(),
            norm_eps=layer.norm_eps,
        )

    def __call__(
        self,
        rows: torch.Tensor,
        batch: ctypes.Array[Any],
        states: Sequence[DeltaNetState],
        mixed: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Runs the batch's tokens: `rows` f32 [T, layer.row] → `out` f32 [T, value_heads * value_dim].

        `batch` is of `trunk_ops.sequences`, `states` one of each sequence, updated in place; `mixed` f32 [T,
        layer.channels] is memory to work in; all contiguous. The bits of a sequence depend neither on the others nor
        on how its tokens are split over calls. Raises NativeLibraryError.
        """
        pointers = ctypes.c_void_p * len(states)
        conv = pointers(*[state.conv.data_ptr() for state in states])
        recurrent = pointers(*[state.recurrent.data_ptr() for state in states])
        call = _Call(
            rows=rows.data_ptr(),
            sequences=ctypes.addressof(batch),
            count=len(states),
            conv=ctypes.addressof(conv),
            recurrent=ctypes.addressof(recurrent),
            mixed=mixed.data_ptr(),
            out=out.data_ptr(),
        )
        if self._run(self._ops.handle, ctypes.addressof(self.structure), ctypes.addressof(call)):
            raise NativeLibraryError("The native library refuses the DeltaNet layer's arguments.")
