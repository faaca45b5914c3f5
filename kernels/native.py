"""The native library by ctypes: experts with few tokens on the CPU. Its C side: kernels/cpu/api.cc, answer.cc."""

import ctypes
import functools
import struct
import weakref
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch

from .geometry import Activation, ExpertSpec, Format
from .library import NativeLibraryError, load
from .quantizers.rows import Factors

_ABI = 11
# Both in the order of the C side's enums.
FORMAT_NUMBERS: dict[str, int] = {name: number for number, name in enumerate(get_args(Format))}
_ACTIVATIONS: tuple[str, ...] = get_args(Activation)


class _Spec(ctypes.Structure):
    """MoehiveSpec of kernels/cpu/expert_mlp.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden_size", "intermediate_size")),
        *((name, ctypes.c_int64) for name in ("up", "up_bias", "down", "down_bias", "post_norm")),
        *((name, ctypes.c_int32) for name in ("up_format", "down_format", "activation", "gated", "has_limit")),
        ("limit_after_activation", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("alpha", "limit", "up_offset", "post_norm_eps")),
    )


class _Rounding(ctypes.Structure):
    """MoehiveRounding of kernels/cpu/rounding.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "importance", "factor", "codes", "d", "m")),
        *((name, ctypes.c_void_p) for name in ("scales", "minimums")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride")),
        ("format", ctypes.c_int32),
    )


@functools.lru_cache(maxsize=1024)  # as many as a model may have layers
def describe(spec: ExpertSpec) -> _Spec:
    """A spec as the C side takes it."""
    offsets = {place.name: place.offset for place in spec.tensors}
    return _Spec(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        **{name: offsets.get(name, -1) for name in ("up", "up_bias", "down", "down_bias", "post_norm")},
        up_format=FORMAT_NUMBERS[spec.format],
        down_format=FORMAT_NUMBERS[spec.back_format],
        activation=_ACTIVATIONS.index(spec.activation),
        gated=spec.gated,
        has_limit=spec.limit is not None,
        limit_after_activation=spec.limit_after_activation,
        alpha=spec.alpha,
        limit=spec.limit or 0.0,
        up_offset=spec.up_offset,
        post_norm_eps=spec.post_norm_eps or 0.0,
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The native library, with the signatures of what this file calls. Raises NativeLibraryError."""
    loaded = load("moehive_abi", _ABI)
    loaded.moehive_kernel.argtypes = (ctypes.c_int32,)
    loaded.moehive_kernel.restype = ctypes.c_char_p
    loaded.moehive_create.argtypes = (ctypes.c_char_p, ctypes.c_int32)
    loaded.moehive_create.restype = ctypes.c_void_p
    loaded.moehive_destroy.argtypes = (ctypes.c_void_p,)
    loaded.moehive_destroy.restype = None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.moehive_experts.argtypes = (pointer, pointer, pointer, size, pointer, pointer, pointer, pointer)
    flag = ctypes.c_int32
    loaded.moehive_layer.argtypes = (
        pointer, pointer, pointer, flag, size, pointer, ctypes.c_char_p, pointer, flag, pointer
    )  # fmt: skip
    loaded.moehive_add_rows.argtypes = (pointer, size, flag, size, pointer)
    loaded.moehive_answer.argtypes = (pointer, pointer, size, pointer, pointer, pointer)
    loaded.moehive_pack.argtypes = (ctypes.c_int32, pointer, size, size, pointer)
    loaded.moehive_pack_words.argtypes = (ctypes.c_int32, pointer, size, size, size, size, pointer)
    loaded.moehive_pack_fp8.argtypes = (pointer, size, size, pointer)
    loaded.moehive_sum_pairs.argtypes = (pointer, pointer, size, size, pointer)
    loaded.moehive_quantize.argtypes = (ctypes.POINTER(_Rounding), ctypes.c_int32)
    return loaded


def pack_rows(fmt: str, rows: torch.Tensor, blocks: int, out: torch.Tensor) -> None:
    """Lays a GGUF file's rows out as kernels/cpu/blocks.h says; releases the GIL.

    `rows` uint8 [rows, bytes of `blocks` blocks of the block format `fmt`], `out` uint8 [tensor_bytes], both
    contiguous. Raises NativeLibraryError.
    """
    if library().moehive_pack(FORMAT_NUMBERS[fmt], rows.data_ptr(), len(rows), blocks, out.data_ptr()) != 0:
        raise NativeLibraryError(f"The native library can't lay out weights in {fmt}.")


def pack_words(fmt: str, words: torch.Tensor, columns: int, out: torch.Tensor) -> None:
    """Lays codes of 4 bits out as kernels/cpu/blocks.h says, all but the blocks' heads; releases the GIL.

    `words` int32 [rows, ceil(columns / 8)] in any strides (formats/nibbles.py), `out` uint8 [tensor_bytes] of `fmt`,
    contiguous. Raises NativeLibraryError.
    """
    steps, rows = words.stride(), len(words)
    arguments = (FORMAT_NUMBERS[fmt], words.data_ptr(), *steps, rows, columns, out.data_ptr())
    if library().moehive_pack_words(*arguments) != 0:
        raise NativeLibraryError(f"The native library can't lay out weights in {fmt}.")


def pack_fp8(codes: torch.Tensor, out: torch.Tensor) -> bool:
    """The same for FP8: `codes` uint8 [rows, columns], contiguous, `out` uint8 [tensor_bytes]; false if one is a NaN.

    Raises NativeLibraryError.
    """
    return not library().moehive_pack_fp8(codes.contiguous().data_ptr(), *codes.shape, out.data_ptr())


def round_rows(
    fmt: str,
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    factor: torch.Tensor | None,
    codes: torch.Tensor,
    factors: Factors,
) -> None:
    """Rounds `weight` f32 [rows, columns] to `fmt` (kernels/cpu/rounding.h), into `codes` and `factors`.

    `importance` f32 [at least `columns` up to whole blocks], `factor` f32 [the same twice]. All contiguous; releases
    the GIL. On as many threads as torch has here. Raises MemoryError, NativeLibraryError.
    """
    job = _Rounding(
        weight=weight.data_ptr(),
        importance=None if importance is None else importance.data_ptr(),
        factor=None if factor is None else factor.data_ptr(),
        codes=codes.data_ptr(),
        **{name: part.data_ptr() for name, part in factors._asdict().items()},
        rows=len(weight),
        columns=weight.shape[1],
        stride=0 if factor is None else factor.stride(0),
        format=FORMAT_NUMBERS[fmt],
    )
    status = library().moehive_quantize(ctypes.byref(job), torch.get_num_threads())
    if status == 2:
        raise MemoryError("There is no memory left for the rows that are rounded.")
    if status != 0:
        raise NativeLibraryError(f"The native library can't round weights to {fmt}.")


def add_rows(
    parts: Sequence[bytes | bytearray | memoryview], rows: int, columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, bool]:
    """The sum of `parts`, each the bytes of [rows, columns] of `dtype` (f32 or bf16): added in f32, in their order.

    Also whether every sum is a number whose square is one, too. The caller has checked the sizes. Raises
    NativeLibraryError.
    """
    total = torch.empty((rows, columns), dtype=dtype)
    places: Any = (part if type(part) is bytes else np.frombuffer(part, np.uint8).ctypes.data for part in parts)
    sound = library().moehive_add_rows(
        (ctypes.c_char_p * len(parts))(*places), len(parts), dtype is torch.bfloat16, rows * columns, total.data_ptr()
    )
    return total, bool(sound)


def kernels() -> list[str]:
    """Names of the kernels that this machine's processor can run, best first. Raises NativeLibraryError."""
    names: list[str] = []
    while name := library().moehive_kernel(len(names)):
        names.append(name.decode())
    return names


class NativeExperts:
    """One kernel with its threads. Calls from several threads wait in line; each releases the GIL."""

    def __init__(self, kernel: str, threads: int) -> None:
        """`kernel` is one of `kernels()`. Raises NativeLibraryError."""
        self._library = library()
        self.handle = self._library.moehive_create(kernel.encode(), threads)
        if not self.handle:
            raise NativeLibraryError(f"The native library can't start its kernel {kernel!r} with {threads} threads.")
        weakref.finalize(self, self._library.moehive_destroy, self.handle)
        self._described: dict[
            int, tuple[ExpertSpec, int, _Spec]
        ] = {}  # by id, which a spec that is kept does not lose

    def layer(
        self,
        spec: ExpertSpec,
        hidden: torch.Tensor,
        offsets: npt.NDArray[np.uint32],
        addresses: Sequence[int],
        weights: npt.NDArray[np.float32],
        added: bool,
        in_place: bool = False,
    ) -> torch.Tensor:
        """The weighted outputs of all pairs [P, H], or with `added` each token's sum [T, H], of hidden's dtype.

        `hidden` f32 or bf16 [T, H], where sums go `in_place`; `addresses` [P] of blobs laid out as `spec` says; the
        rest as `pairs` takes it.
        One call, for when its own cost counts: a step of decoding. Raises MemoryError.
        """
        kept = self._described.get(id(spec))
        if kept is None:
            described = describe(spec)
            kept = self._described[id(spec)] = spec, ctypes.addressof(described), described
        tokens = len(hidden)
        if added and in_place:
            rows = hidden
        else:
            rows = torch.empty((tokens if added else len(addresses), hidden.shape[1]), dtype=hidden.dtype)
        self._check(
            self._library.moehive_layer(
                self.handle,
                kept[1],
                hidden.data_ptr(),
                hidden.dtype is torch.bfloat16,
                tokens,
                offsets.tobytes(),  # a few numbers: a copy is quicker than numpy's `ctypes`
                struct.pack(f"={len(addresses)}Q", *addresses),
                weights.tobytes(),
                added,
                rows.data_ptr(),
            )
        )
        return rows

    def pairs(
        self,
        spec: ExpertSpec,
        hidden: torch.Tensor,
        offsets: npt.NDArray[np.uint32],
        addresses: npt.NDArray[np.uint64],
        weights: npt.NDArray[np.float32],
        out: torch.Tensor,
    ) -> None:
        """Writes the weighted output of each pair into `out` f32 [P, H]; leaves rows with address 0 alone.

        `hidden` f32 [T, H]; `offsets` [T + 1], checked by the caller; `addresses` [P] of blobs laid out as `spec`
        says; `weights` [P]. All contiguous. Raises MemoryError.
        """
        self._check(
            self._library.moehive_experts(
                self.handle,
                ctypes.byref(describe(spec)),
                hidden.data_ptr(),
                len(hidden),
                offsets.ctypes.data,
                addresses.ctypes.data,
                weights.ctypes.data,
                out.data_ptr(),
            )
        )

    def sum_pairs(self, pairs: torch.Tensor, offsets: npt.NDArray[np.uint32]) -> torch.Tensor:
        """Adds each token's pairs in the order listed: `pairs` f32 [P, H] → f32 [T, H]."""
        sums = torch.empty(len(offsets) - 1, pairs.shape[1])
        self._check(
            self._library.moehive_sum_pairs(
                pairs.data_ptr(), offsets.ctypes.data, len(sums), pairs.shape[1], sums.data_ptr()
            )
        )
        return sums

    @staticmethod
    def _check(status: int) -> None:
        if status == 2:
            raise MemoryError("There is no memory left for the experts' intermediate results.")
        if status != 0:
            raise NativeLibraryError("The native library refuses the layer's arguments.")
