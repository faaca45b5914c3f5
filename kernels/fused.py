"""Operations of one layer that follow each other, in one native call each (kernels/cpu/fused.cc).

For few tokens. Between two calls Python takes as long as a small layer does, and longest in the middle of a step,
whose weights have emptied the caches of everything else. The results have the bits of the single operations.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch

from .delta_net import DeltaNet, DeltaNetState
from .geometry import Activation
from .linear import LinearWeights, Matrix
from .trunk_ops import (
    ACTIVATIONS,
    AttentionLayer,
    RouterLayer,
    TrunkOps,
    TrunkSequences,
    native_trunk,
    raise_status,
)


class _Mlp(ctypes.Structure):
    """MoehiveMlp of kernels/cpu/fused.cc, field for field."""

    _fields_ = (("up", Matrix * 2), ("down", Matrix), ("share", Matrix), ("activation", ctypes.c_int32))


class _Mixer(ctypes.Structure):
    """MoehiveMixer of kernels/cpu/fused.cc, field for field."""

    _fields_ = (("projections", ctypes.c_void_p), ("count", ctypes.c_int64), ("output", Matrix))


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_trunk()
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for name, arguments in {
        "router": (pointer, pointer, pointer, pointer, size, pointer, pointer),
        "mlp": (pointer, pointer, pointer, size, pointer, pointer),
        "attend": (pointer, pointer, pointer, pointer, size, pointer, size, pointer, pointer, pointer),
        "delta_net": (pointer, pointer, pointer, pointer, pointer, size, pointer),
    }.items():
        function = getattr(library, f"moehive_fused_{name}")
        function.restype, function.argtypes = ctypes.c_int32, arguments
    return library


class FusedRouter:
    """A router's product and its choice of experts."""

    def __init__(self, ops: TrunkOps, weights: LinearWeights, router: RouterLayer) -> None:
        self._kept = weights, router, router.structure()
        self._handle = ops.handle
        self._layer = ctypes.addressof(weights.native), ctypes.addressof(self._kept[2])
        self._run = _library().moehive_fused_router

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """`x` f32 [T, hidden] → `ids` int64 and `weights` f32 [T, top_k], likeliest first.

        Raises MemoryError, NativeLibraryError.
        """
        status = self._run(self._handle, *self._layer, x.data_ptr(), len(x), ids.data_ptr(), weights.data_ptr())
        if status:
            raise_status(status)


class FusedMlp:
    """A gated MLP, and how much of it each token takes."""

    def __init__(
        self,
        ops: TrunkOps,
        gate: LinearWeights,
        up: LinearWeights,
        down: LinearWeights,
        activation: Activation,
        share: LinearWeights | None = None,
    ) -> None:
        """`share` [1, hidden]: of a shared expert, before the sigmoid."""
        self._kept = gate, up, down, share
        self._handle = ops.handle
        none = Matrix()
        self._native = _Mlp(
            (Matrix * 2)(gate.native, up.native),
            down.native,
            none if share is None else share.native,
            ACTIVATIONS[activation],
        )
        self._layer = ctypes.addressof(self._native)
        self._run = _library().moehive_fused_mlp

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x` f32 [T, hidden] → f32 [T, hidden], and its share [T]. Raises MemoryError, NativeLibraryError."""
        tokens = len(x)
        out = torch.empty(tokens, self._kept[2].rows)
        share = None if self._kept[3] is None else torch.empty(tokens)
        status = self._run(
            self._handle,
            self._layer,
            x.data_ptr(),
            tokens,
            out.data_ptr(),
            None if share is None else share.data_ptr(),
        )
        if status:
            raise_status(status)
        return out, share


class _FusedMixer:
    """What softmax attention and DeltaNet have in common: projections before, and one matrix after."""

    def __init__(self, ops: TrunkOps, projections: Sequence[LinearWeights], output: LinearWeights) -> None:
        self._kept = tuple(projections), output
        self._handle = ops.handle
        self._matrices = (Matrix * len(projections))(*(one.native for one in projections))
        self._mixer = _Mixer(ctypes.addressof(self._matrices), len(projections), output.native)
        self._around = ctypes.addressof(self._mixer)
        self._width = output.rows


class FusedAttention(_FusedMixer):
    """Softmax attention over the paged KV cache, with its projections."""

    def __init__(
        self, ops: TrunkOps, projections: Sequence[LinearWeights], layer: AttentionLayer, output: LinearWeights
    ) -> None:
        super().__init__(ops, projections, output)
        self._layer = layer  # keeps the tensors alive that `_native` points to
        self._native = layer.structure()
        self._run = _library().moehive_fused_attend

    def __call__(self, x: torch.Tensor, batch: TrunkSequences, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`x` f32 [T, hidden] → f32 [T, hidden]; see TrunkOps.attend. Raises MemoryError, NativeLibraryError."""
        out = torch.empty(len(x), self._width)
        status = self._run(
            self._handle,
            self._around,
            ctypes.addressof(self._native),
            x.data_ptr(),
            len(x),
            ctypes.addressof(batch),
            len(batch),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
        )
        if status:
            raise_status(status)
        return out


class FusedDeltaNet(_FusedMixer):
    """Gated DeltaNet with its projections."""

    def __init__(
        self, ops: TrunkOps, projections: Sequence[LinearWeights], net: DeltaNet, output: LinearWeights
    ) -> None:
        super().__init__(ops, projections, output)
        self._net = net
        self._run = _library().moehive_fused_delta_net

    def __call__(self, x: torch.Tensor, batch: TrunkSequences, states: Sequence[DeltaNetState]) -> torch.Tensor:
        """`x` f32 [T, hidden] → f32 [T, hidden]; see DeltaNet. Raises MemoryError, NativeLibraryError."""
        out = torch.empty(len(x), self._width)
        call = self._net.call(batch, states)
        status = self._run(
            self._handle,
            self._around,
            self._net.address,
            ctypes.addressof(call),
            x.data_ptr(),
            len(x),
            out.data_ptr(),
        )
        if status:
            raise_status(status)
        return out
