"""A decoder's layer for few tokens, in two native calls (kernels/cpu/layer.cc): up to the choice of experts, and the
MLP that is computed here while others compute those.

Between two calls Python takes as long as a small layer does, and longest in the middle of a step, whose weights have
emptied the caches of everything else. So all that stays is described once, when the weights are there, and a pass
works in memory that stays, too. The results have the bits of the single operations.
"""

import ctypes
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .geometry import Activation
from .linear import FEW_TOKENS, LinearWeights, Matrix
from .trunk_ops import ACTIVATIONS, RouterLayer, RouterStructure, TrunkOps, TrunkSequences, native_trunk, raise_status

_KINDS = {"softmax": 0, "delta_net": 1, "latent": 2}
_NONE = Matrix()  # no rows: no matrix


class _Mlp(ctypes.Structure):
    """MoehiveMlp of kernels/cpu/layer.cc, field for field."""

    _fields_ = (("up", Matrix * 2), ("down", Matrix), ("share", Matrix), ("activation", ctypes.c_int32))


class _Mixer(ctypes.Structure):
    """MoehiveMixer of kernels/cpu/layer.cc, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layer", "projections")),
        ("count", ctypes.c_int64),
        *((name, Matrix) for name in ("output", "queries")),
        ("query_norm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("group", "conv", "recurrent")),
        ("query_eps", ctypes.c_float),
        ("kind", ctypes.c_int32),
    )


class _Layer(ctypes.Structure):
    """MoehiveLayer of kernels/cpu/layer.cc, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("before", "norm", "mlp_norm")),
        ("mixer", _Mixer),
        ("router_weights", Matrix),
        ("router", RouterStructure),
        ("mlp", _Mlp),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    """MoehiveStep of kernels/cpu/layer.cc, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "count")),
        *((name, ctypes.c_void_p) for name in ("sequences", "groups", "states", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("hidden", "x", "half", "added", "share", "logits", "ids", "weights")),
        ("beside", ctypes.c_void_p),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = native_trunk()
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name, arguments in {
        "layer_mix": (pointer, pointer, pointer, pointer, flag),
        "layer_mlp": (pointer, pointer, pointer),
        "layers_end": (pointer, pointer, pointer, pointer, flag, pointer, pointer, pointer, size, pointer),
        "layer_drop": (pointer,),
        "beside_create": (),
        "beside_destroy": (pointer,),
        "beside_times": (pointer, pointer),
    }.items():
        function = getattr(library, f"moehive_{name}")
        function.restype, function.argtypes = flag, arguments
    library.moehive_beside_create.restype = pointer
    library.moehive_layer_drop.restype = library.moehive_beside_destroy.restype = None
    library.moehive_beside_times.restype = ctypes.c_bool
    return library


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixer:
    """How a layer mixes tokens, with the linear layers around it.

    `structure` is of the class that `kind` says: of trunk_ops.AttentionLayer, delta_net.DeltaNet or mla.Mla.
    """

    kind: Literal["softmax", "delta_net", "latent"]
    structure: ctypes.Structure
    owner: object  # keeps alive what `structure` points to
    projections: Sequence[LinearWeights]  # of the layer's input: their outputs, one after the other, are a row
    output: LinearWeights
    group: int = 0  # softmax, latent: whose pages hold the layer's part of the cache
    states: tuple[int, int] = (0, 0)  # DeltaNet: which of a sequence's states are its `conv` and its `recurrent`
    queries: LinearWeights | None = None  # latent: of the input, or of the normed first projection
    query_norm: torch.Tensor | None = None  # f32 [columns of `queries`]
    query_eps: float = 0.0

    @property
    def projected(self) -> int:
        """Columns of a row of `projections`."""
        return sum([one.rows for one in self.projections])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GatedMlp:
    """down(activation(gate(x)) * up(x)), and for a shared expert how much of it a token takes."""

    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights
    activation: Activation
    share: LinearWeights | None = None  # [1, hidden], before the sigmoid; None: all of it


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """A router: its matrix [experts, hidden], and how it chooses."""

    weights: LinearWeights
    layer: RouterLayer


class Step:
    """What a pass's calls hand on: memory for up to FEW_TOKENS tokens, and where the pass's sequences lie.

    After `begin` these are of the pass's tokens: `hidden` f32 [T, width], the residual stream, to be filled in;
    `sent` [T, width], what the layer's experts are asked with, f32 or bf16; `ids` int64 and `weights` f32 [T, top_k],
    the router's choice, likeliest first, and `logits` f32 [T, experts] what it chose by. The next layer's call
    overwrites them.
    """

    hidden: torch.Tensor
    sent: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor

    def __init__(self, width: int, router: RouterLayer | None, half: bool) -> None:
        """`router`: any layer's, for the sizes; `half`: the experts are asked in bf16."""
        hidden, x, added = (torch.empty(FEW_TOKENS, width) for _ in range(3))
        sent = torch.empty(FEW_TOKENS, width, dtype=torch.bfloat16) if half else x
        experts, top_k = (0, 0) if router is None else (router.experts, router.top_k)
        ids = torch.empty(FEW_TOKENS, top_k, dtype=torch.int64)
        weights, logits = torch.empty(FEW_TOKENS, top_k), torch.empty(FEW_TOKENS, experts)
        share = torch.empty(FEW_TOKENS)
        self._all = hidden, sent, ids, weights, logits
        self._kept: object = x, added, share
        self._parts: dict[int, tuple[torch.Tensor, ...]] = {}  # by the number of tokens
        self._beside = _library().moehive_beside_create()
        if not self._beside:
            raise MemoryError("There is no memory left for another forward pass.")
        weakref.finalize(self, _library().moehive_beside_destroy, self._beside)
        self._native = _Step(
            hidden=hidden.data_ptr(),
            x=x.data_ptr(),
            half=sent.data_ptr() if half else None,
            added=added.data_ptr(),
            share=share.data_ptr(),
            logits=logits.data_ptr(),
            ids=ids.data_ptr(),
            weights=weights.data_ptr(),
            beside=self._beside,
        )
        self.address = ctypes.addressof(self._native)

    def begin(
        self,
        tokens: int,
        batch: TrunkSequences,
        groups: Sequence[TrunkSequences],
        states: ctypes.Array[Any],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        """A pass of `tokens`; all but `tokens` must stay as it is until the pass ends.

        `batch`: its sequences; `groups`: the same with each group's pages; `states`: of each sequence the address of
        its states' addresses; `cos`, `sin` f32 [T, n].
        """
        parts = self._parts.get(tokens)
        if parts is None:
            parts = self._parts[tokens] = tuple([one[:tokens] for one in self._all])
        self.hidden, self.sent, self.ids, self.weights, self.logits = parts
        pages = (ctypes.c_void_p * len(groups))(*[ctypes.addressof(group) for group in groups])
        native = self._native
        native.tokens, native.count = tokens, len(batch)
        native.sequences, native.groups = ctypes.addressof(batch), ctypes.addressof(pages)
        native.states, native.cos, native.sin = ctypes.addressof(states), cos.data_ptr(), sin.data_ptr()
        self._pass: object = batch, groups, pages, states, cos, sin

    def drop(self) -> None:
        """Ends a pass before its `logits`: from here on nobody works in its memory."""
        _library().moehive_layer_drop(self.address)

    def beside(self) -> tuple[int, int] | None:
        """When another thread began and ended the latest routed layer's own MLP, as `perf_counter_ns`.

        None: it has not ended, or the pass's own thread computed it.
        """
        times = (ctypes.c_int64 * 2)()
        return (times[0], times[1]) if _library().moehive_beside_times(self._beside, times) else None


class DecoderLayer:
    """One layer, described for the native calls; keeps its tensors alive."""

    def __init__(
        self,
        ops: TrunkOps,
        *,
        norm: torch.Tensor,
        mixer: Mixer,
        mlp_norm: torch.Tensor,
        eps: float,
        router: Router | None,
        mlp: GatedMlp | None,
        before: "DecoderLayer | None",
    ) -> None:
        """`norm` and `mlp_norm` f32 [width], both with `eps`; `router`: None if no experts are elsewhere.

        `mlp`: what is computed here, all or a shared expert; `before`: the layer before, whose sums this one adds.
        """
        projections = (Matrix * len(mixer.projections))(*[one.native for one in mixer.projections])
        self._kept: object = norm, mixer, projections, mlp_norm, router, mlp, before
        self._handle = ops.handle
        self._native = _Layer(
            before=None if before is None else before.address,
            norm=norm.data_ptr(),
            mlp_norm=mlp_norm.data_ptr(),
            mixer=_Mixer(
                layer=ctypes.addressof(mixer.structure),
                projections=ctypes.addressof(projections),
                count=len(projections),
                output=mixer.output.native,
                queries=_native(mixer.queries),
                query_norm=None if mixer.query_norm is None else mixer.query_norm.data_ptr(),
                group=mixer.group,
                conv=mixer.states[0],
                recurrent=mixer.states[1],
                query_eps=mixer.query_eps,
                kind=_KINDS[mixer.kind],
            ),
            router_weights=_NONE if router is None else router.weights.native,
            router=RouterStructure() if router is None else router.layer.structure(),
            mlp=_Mlp() if mlp is None else _mlp(mlp),
            width=len(norm),
            eps=eps,
        )
        self.address: int = ctypes.addressof(self._native)
        library = _library()
        self._mix, self._mlp, self._end = (
            library.moehive_layer_mix,
            library.moehive_layer_mlp,
            library.moehive_layers_end,
        )

    def mix(self, step: Step, add: torch.Tensor | None) -> None:
        """From the sums of the layer before to the choice of experts, `step.ids`, or to the MLP's input.

        A thread of the pool that is awake then begins what the layer has beside its routed experts.

        `add` [T, width] f32 or bf16: of the routed experts of the layer before, if it has any. Raises MemoryError,
        NativeLibraryError.
        """
        if add is None:
            status = self._mix(self._handle, self.address, step.address, None, False)
        else:
            half = add.dtype is torch.bfloat16
            status = self._mix(self._handle, self.address, step.address, add.data_ptr(), half)
        if status:
            raise_status(status)

    def mlp(self, step: Step) -> None:
        """What of the MLP is computed here, for the next layer to add: all of it, unless a thread has begun.

        Raises MemoryError, NativeLibraryError.
        """
        status = self._mlp(self._handle, self.address, step.address)
        if status:
            raise_status(status)

    def logits(
        self, step: Step, add: torch.Tensor | None, norm: torch.Tensor, head: LinearWeights, wanted: torch.Tensor
    ) -> torch.Tensor:
        """After this layer, the last: f32 [len(wanted), vocabulary] of the tokens `wanted` int64.

        `add` as in `mix`; `norm` f32 [width]. Raises MemoryError, NativeLibraryError.
        """
        logits = torch.empty(len(wanted), head.rows)
        status = self._end(
            self._handle,
            self.address,
            step.address,
            None if add is None else add.data_ptr(),
            add is not None and add.dtype is torch.bfloat16,
            norm.data_ptr(),
            ctypes.addressof(head.native),
            wanted.data_ptr(),
            len(wanted),
            logits.data_ptr(),
        )
        if status:
            raise_status(status)
        return logits


def _native(weights: LinearWeights | None) -> Matrix:
    return _NONE if weights is None else weights.native


def _mlp(mlp: GatedMlp) -> _Mlp:
    return _Mlp(
        (Matrix * 2)(mlp.gate.native, mlp.up.native), mlp.down.native, _native(mlp.share), ACTIVATIONS[mlp.activation]
    )
