"""The door to the trunk's own arithmetic on the CPU: norms, rotary embedding, paged attention, router.

Thin calls of kernels/cpu/trunk_api.cc by ctypes, a few microseconds each; tensors are f32, contiguous and on the CPU,
and nobody checks that again. A row's result depends on that row alone, never on what else is in the batch.
"""

import ctypes
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch

from .geometry import Activation, GeometryError
from .library import NativeLibraryError, load

PAGE = 32  # tokens of a KV cache's page
MAX_HEAD = 512  # numbers of a head
_ABI = 6
ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
_SCORES = {"softmax": 0, "sigmoid": 1, "chosen_softmax": 2}


class _Attention(ctypes.Structure):
    """MoehiveAttention of kernels/cpu/trunk.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "rotary")),
        *((name, ctypes.c_int64) for name in ("row", "query_stride", "gate_at", "keys_at", "values_at")),
        *((name, ctypes.c_int64) for name in ("page_at", "window")),
        *((name, ctypes.c_void_p) for name in ("query_norm", "key_norm", "sinks")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        *((name, ctypes.c_int32) for name in ("interleaved", "half")),
    )


class _Sequence(ctypes.Structure):
    """MoehiveSequence of kernels/cpu/trunk.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("first", "tokens", "start")),
        ("pages", ctypes.c_void_p),
    )


class RouterStructure(ctypes.Structure):
    """MoehiveRouter of kernels/cpu/trunk.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("experts", "top_k", "groups", "top_groups")),
        ("bias", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("scores", "renormalize")),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionLayer:
    """One attention layer. A row of its input holds a token's queries, then keys, then values.

    With `gated`, each query head is followed by its output gate of the same size. `page_at` is the first byte of
    this layer's part in a page, of `page_bytes` bytes.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: int  # numbers of a head that are turned, the first ones; even
    scale: float  # of queries · keys
    page_at: int
    dtype: torch.dtype  # of the KV cache: f32 or bf16
    window: int | None = None  # keys that a query sees, itself included
    gated: bool = False
    interleaved: bool = False  # turns the pairs (0, 1), (2, 3), …, not (0, n / 2), (1, n / 2 + 1), …
    query_norm: torch.Tensor | None = None  # f32 [head_dim]
    key_norm: torch.Tensor | None = None
    eps: float = 1e-6  # of these norms
    sinks: torch.Tensor | None = None  # f32 [heads]; each a key without a value

    def __post_init__(self) -> None:
        """Raises GeometryError."""
        check_numbers("query norm", self.query_norm, self.head_dim)
        check_numbers("key norm", self.key_norm, self.head_dim)
        check_numbers("sinks", self.sinks, self.heads)
        if not 0 <= self.rotary <= self.head_dim or self.rotary % 2:
            raise GeometryError(f"{self.rotary} numbers can't be turned of heads of {self.head_dim}.")

    @property
    def row(self) -> int:
        """Numbers in a row of the input."""
        return (self.heads * (2 if self.gated else 1) + 2 * self.kv_heads) * self.head_dim

    @property
    def keys_bytes(self) -> int:
        """Bytes of a page's keys in this layer."""
        return self.kv_heads * self.head_dim * PAGE * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of a page's keys and values in this layer; values are padded to 16 numbers."""
        return self.keys_bytes + self.kv_heads * (-(-self.head_dim // 16) * 16) * PAGE * self.dtype.itemsize

    def structure(self) -> _Attention:
        """For the native library; valid while this object lives."""
        heads = self.heads * (2 if self.gated else 1)
        return _Attention(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rotary=self.rotary,
            row=self.row,
            query_stride=self.head_dim * (2 if self.gated else 1),
            gate_at=self.head_dim if self.gated else -1,
            keys_at=heads * self.head_dim,
            values_at=(heads + self.kv_heads) * self.head_dim,
            page_at=self.page_at,
            window=self.window or 0,
            query_norm=_pointer(self.query_norm),
            key_norm=_pointer(self.key_norm),
            sinks=_pointer(self.sinks),
            eps=self.eps,
            scale=self.scale,
            interleaved=self.interleaved,
            half=self.dtype == torch.bfloat16,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterLayer:
    """How a token's experts are chosen from the router's logits.

    `softmax` and `sigmoid` score all experts; `bias` [experts] f32 is added for the choice alone; of `groups` equal
    groups the `top_groups` with the largest sums of their two best scores are left. `chosen_softmax` takes the
    largest logits and normalizes them alone. `renormalize` divides the chosen weights by their sum.
    """

    experts: int
    top_k: int
    scores: Literal["softmax", "sigmoid", "chosen_softmax"]
    renormalize: bool
    bias: torch.Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0

    def __post_init__(self) -> None:
        """Raises GeometryError."""
        check_numbers("router's bias", self.bias, self.experts)
        top, groups = self.top_groups, self.groups
        counts = all(type(count) is int and count > 0 for count in (self.experts, self.top_k, top, groups))
        if not counts or self.experts % groups or top > groups or self.top_k > self.experts // groups * top:
            raise GeometryError(
                f"{self.top_k!r} of {self.experts!r} experts can't be chosen from {top!r} of {groups!r} groups."
            )

    def structure(self) -> RouterStructure:
        """For the native library; valid while this object lives."""
        return RouterStructure(
            experts=self.experts,
            top_k=self.top_k,
            groups=self.groups,
            top_groups=self.top_groups,
            bias=_pointer(self.bias),
            scaling=self.scaling,
            scores=_SCORES[self.scores],
            renormalize=self.renormalize,
        )


def check_numbers(what: str, tensor: torch.Tensor | None, wanted: int) -> None:
    """The native library reads so many numbers of a tensor, whatever its size. Raises GeometryError."""
    if tensor is not None and tensor.numel() != wanted:
        raise GeometryError(f"A layer's {what} has {tensor.numel()} numbers, but its config says {wanted}.")


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def native_trunk() -> ctypes.CDLL:
    """The native library's part for trunks. Raises NativeLibraryError."""
    library = load("moehive_trunk_abi", _ABI)
    pointer, size, flag, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "create": (pointer, (flag,)),
        "destroy": (None, (pointer,)),
        "rest": (None, (pointer,)),
        "add_norm": (
            None,
            (pointer, size, size, pointer, pointer, flag, pointer, pointer, size, pointer, number, pointer, pointer),
        ),
        "rope": (None, (pointer, size, pointer, size, number, pointer, pointer)),
        "attend": (flag, (pointer, pointer, pointer, pointer, size, pointer, pointer, pointer)),
        "gate": (None, (pointer, pointer, size, size, size, flag, pointer)),
        "route": (flag, (pointer, pointer, pointer, size, pointer, pointer)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"moehive_trunk_{name}")
        function.restype, function.argtypes = result, arguments
    return library


TrunkSequences: TypeAlias = ctypes.Array[_Sequence]  # of a batch, as `sequences` makes them


def sequences(rows: Sequence[tuple[int, int, int, int]]) -> TrunkSequences:
    """Of each sequence (first row, tokens, position of the first, address of its pages' addresses)."""
    made: Any = _Sequence * len(rows)  # ctypes takes tuples for structures, which its types do not say
    return cast(TrunkSequences, made(*rows))


class TrunkOps:
    """The operations, with threads of their own for long work. Calls release the GIL."""

    def __init__(self, threads: int) -> None:
        """`threads`: cores to use, at least 1. Raises NativeLibraryError."""
        library = native_trunk()
        self.handle = library.moehive_trunk_create(threads)
        if not self.handle:
            raise NativeLibraryError(f"The native library can't start the trunk's {threads} threads.")
        weakref.finalize(self, library.moehive_trunk_destroy, self.handle)
        self._add_norm = library.moehive_trunk_add_norm
        self._rope = library.moehive_trunk_rope
        self._attend = library.moehive_trunk_attend
        self._gate = library.moehive_trunk_gate
        self._route = library.moehive_trunk_route
        self._rest = library.moehive_trunk_rest

    def rest(self) -> None:
        """Others compute now, maybe on this machine: idle threads sleep instead of watching for the next call."""
        self._rest(self.handle)

    def add_norm(
        self,
        hidden: torch.Tensor,
        add: torch.Tensor | None = None,
        more: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        out: torch.Tensor | None = None,
        half_out: torch.Tensor | None = None,
    ) -> None:
        """`hidden` [T, H] += add + more * sigmoid(gate), then `out` [T, H] = its RMS norm times `norm` [H].

        `add` [T, H] f32 or bf16, `more` [T, H]; `gate` [T], of any stride. `half_out` bf16 [T, H] gets `out` too.
        """
        tokens, width = hidden.shape
        self._add_norm(
            self.handle,
            tokens,
            width,
            hidden.data_ptr(),
            None if add is None else add.data_ptr(),
            add is not None and add.dtype == torch.bfloat16,
            None if more is None else more.data_ptr(),
            None if gate is None else gate.data_ptr(),
            0 if gate is None else gate.stride(0),
            None if norm is None else norm.data_ptr(),
            eps,
            None if out is None else out.data_ptr(),
            None if half_out is None else half_out.data_ptr(),
        )

    def rope(self, batch: TrunkSequences, inverse: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin f32 [T, n] of the tokens' positions times `inverse` f32 [n], both times `scaling`."""
        shape = sum([one.tokens for one in batch]), len(inverse)
        cos, sin = torch.empty(shape), torch.empty(shape)
        self._rope(
            ctypes.addressof(batch),
            len(batch),
            inverse.data_ptr(),
            len(inverse),
            scaling,
            cos.data_ptr(),
            sin.data_ptr(),
        )
        return cos, sin

    def attend(
        self,
        layer: _Attention,
        rows: torch.Tensor,
        batch: TrunkSequences,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attention of `rows` [T, layer.row] over the pages of `batch`, after their own keys and values went there.

        Queries in `rows` are normed and turned in place; `cos`, `sin` [T, rotary / 2]; `out` [T, heads * head_dim].
        Raises MemoryError, NativeLibraryError.
        """
        status = self._attend(
            self.handle,
            ctypes.addressof(layer),
            rows.data_ptr(),
            ctypes.addressof(batch),
            len(batch),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
        )
        if status:
            raise_status(status)

    def gate(self, rows: torch.Tensor, activation: Activation, out: torch.Tensor) -> None:
        """`out` [T, n] = activation(rows[:, :n]) * rows[:, n : 2 * n]; `rows` may have more columns."""
        tokens, middle = out.shape
        self._gate(
            self.handle, rows.data_ptr(), tokens, middle, rows.stride(0), ACTIVATIONS[activation], out.data_ptr()
        )

    def route(self, router: RouterStructure, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """The experts of each token, likeliest first: `logits` [T, experts] → `ids` int64, `weights` [T, top_k].

        Raises MemoryError, NativeLibraryError.
        """
        status = self._route(
            self.handle, ctypes.addressof(router), logits.data_ptr(), len(logits), ids.data_ptr(), weights.data_ptr()
        )
        if status:
            raise_status(status)


def raise_status(status: int) -> None:
    """Raises MemoryError or NativeLibraryError, by what a native call returned."""
    if status == 2:
        raise MemoryError("There is no memory left for the trunk's intermediate results.")
    raise NativeLibraryError("The native library refuses the layer's arguments.")
