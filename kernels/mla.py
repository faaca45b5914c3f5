"""The door to multi-head latent attention on the CPU: everything between its projections, for a batch of sequences.

The cache holds one latent and one rotary key for a token, whatever the number of heads; the absorbed form computes
with them as they are (kernels/cpu/mla.h).
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from .library import NativeLibraryError
from .trunk_ops import PAGE, TrunkOps, check_numbers, native_trunk

MAX_RANK, MAX_HEAD_PART = 1024, 256  # what the native library has room for


class _Mla(ctypes.Structure):
    """MoehiveMla of kernels/cpu/mla.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "nope", "rope", "rank", "value", "page_at")),
        *((name, ctypes.c_void_p) for name in ("up", "norm")),
        *((name, ctypes.c_float) for name in ("norm_eps", "scale")),
        *((name, ctypes.c_int32) for name in ("half_up", "half", "interleaved")),
    )


class _Call(ctypes.Structure):
    """MoehiveMlaCall of kernels/cpu/mla.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "compressed")),
        ("compressed_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "sequences")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("absorbed", "out")),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MlaLayer:
    """One layer's shapes and small weights. `page_at` is the first byte of its part in a page, of `page_bytes`."""

    heads: int
    nope: int  # numbers of a query head that are not turned
    rope: int  # and of those that are
    rank: int  # numbers of a latent
    value: int  # numbers of a head's value
    scale: float  # of queries · keys
    up: torch.Tensor  # f32 or bf16 [heads * (nope + value), rank]: kv_b_proj
    norm: torch.Tensor  # f32 [rank]
    norm_eps: float
    page_at: int
    dtype: torch.dtype  # of the cache: f32 or bf16
    interleaved: bool  # turns the pairs (0, 1), (2, 3), …, not (0, n / 2), (1, n / 2 + 1), …

    @property
    def page_bytes(self) -> int:
        """Bytes of a page's latents and rotary keys in this layer."""
        return PAGE * (self.rank + self.rope) * self.dtype.itemsize


class Mla:
    """A layer ready to compute; keeps its tensors and threads alive."""

    def __init__(self, ops: TrunkOps, layer: MlaLayer) -> None:
        """Raises NativeLibraryError if the shapes are larger than what the native library has room for.

        Raises GeometryError for tensors of other shapes.
        """
        self.layer = layer
        self._ops = ops  # whose handle is used
        self._run = native_trunk().moehive_trunk_mla
        self._run.argtypes = (ctypes.c_void_p,) * 3
        self._run.restype = ctypes.c_int32
        if layer.rank > MAX_RANK or max(layer.nope, layer.rope) > MAX_HEAD_PART or (layer.rope | layer.rank) % 2:
            raise NativeLibraryError(
                f"Latent attention of rank {layer.rank} with heads of {layer.nope} and {layer.rope} numbers is "
                f"not supported; a rank of {MAX_RANK} and {MAX_HEAD_PART} each, even, are."
            )
        check_numbers("latent up-projection", layer.up, layer.heads * (layer.nope + layer.value) * layer.rank)
        check_numbers("latent norm", layer.norm, layer.rank)
        self.structure = _Mla(
            heads=layer.heads,
            nope=layer.nope,
            rope=layer.rope,
            rank=layer.rank,
            value=layer.value,
            page_at=layer.page_at,
            up=layer.up.data_ptr(),
            norm=layer.norm.data_ptr(),
            norm_eps=layer.norm_eps,
            scale=layer.scale,
            half_up=layer.up.dtype == torch.bfloat16,
            half=layer.dtype == torch.bfloat16,
            interleaved=layer.interleaved,
        )

    def __call__(
        self,
        queries: torch.Tensor,
        compressed: torch.Tensor,
        batch: ctypes.Array[Any],
        cos: torch.Tensor,
        sin: torch.Tensor,
        absorbed: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attention of the batch's tokens, after their own latents went to the sequences' pages.

        `queries` f32 [T, heads * (nope + rope)]; `compressed` f32 [T, rank + rope], whose rows may lie further apart:
        neither normed nor turned; `batch` is of `trunk_ops.sequences`; `cos`, `sin` f32 [T, rope / 2]; `absorbed` f32
        [T, heads * (rank + rope)] is memory to work in; `out` f32 [T, heads * value]. Raises NativeLibraryError.
        """
        call = _Call(
            queries=queries.data_ptr(),
            compressed=compressed.data_ptr(),
            compressed_row=compressed.stride(0),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            sequences=ctypes.addressof(batch),
            count=len(batch),
            absorbed=absorbed.data_ptr(),
            out=out.data_ptr(),
        )
        if self._run(self._ops.handle, ctypes.addressof(self.structure), ctypes.addressof(call)):
            raise NativeLibraryError("The native library refuses the latent attention's arguments.")
