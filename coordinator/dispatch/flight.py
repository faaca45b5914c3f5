"""One layer of few tokens on its way, as Python sees it; cpp/flight.h has the rest."""

import asyncio
import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..timeline import Trip
from ..types import LOCAL, NodeName, NodeUnavailable
from .link import Link
from .native import address
from .parts import Sent
from .routing import Share, block_size, shares_of
from .rows import Rows
from .speeds import FEW_TOKENS
from .sums import Kind

MAX_SHARES = 64
ASKED, HERE, TAKEN, FAILED = range(4)  # a share's states


class NativeTrip(ctypes.Structure):
    """Trip of cpp/view.h, field for field; timeline.py's has the same numbers."""

    _fields_ = tuple((name, ctypes.c_int64) for name in Trip._fields)


class View(ctypes.Structure):
    """View of cpp/view.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("shares", "waiting", "here", "unknown", "unsent", "owed")),
        ("expected_s", ctypes.c_double),
        ("block", ctypes.c_void_p),
        *((name, ctypes.c_int64 * MAX_SHARES) for name in ("state", "node", "message", "size", "sent")),
        ("trip", NativeTrip * MAX_SHARES),
    )

    shares: int
    waiting: int
    here: int
    unknown: int
    unsent: int
    owed: int
    expected_s: float
    block: int
    state: "ctypes.Array[ctypes.c_int64]"
    node: "ctypes.Array[ctypes.c_int64]"
    message: "ctypes.Array[ctypes.c_int64]"
    size: "ctypes.Array[ctypes.c_int64]"
    sent: "ctypes.Array[ctypes.c_int64]"
    trip: "ctypes.Array[NativeTrip]"


class Way(ctypes.Structure):
    """Way of cpp/way.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("holders", "first", "peers")),
        *(
            (name, ctypes.c_int64)
            for name in ("experts", "most", "nodes", "local", "k", "hidden_size", "expert_bytes")
        ),
        *((name, ctypes.c_uint64) for name in ("epoch", "id_step")),
        *((name, ctypes.c_uint32) for name in ("layer", "reduction", "has_choice")),
    )

    experts: int
    k: int
    hidden_size: int
    kept: tuple[Any, ...]  # whose memory it names


class Memory:
    """What a layer is asked with, as native code sees it. A trunk asks for layer after layer from the same."""

    __slots__ = ("bf16", "hidden", "ids", "k", "kind", "places", "tokens", "weights", "width")

    def __init__(self, hidden: torch.Tensor, ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float32]) -> None:
        self.hidden, self.ids, self.weights = hidden, ids, weights
        (self.tokens, self.k), self.width = ids.shape, hidden.shape[1]
        self.bf16 = hidden.dtype is torch.bfloat16
        self.kind: Kind = self.tokens, self.width, self.bf16
        self.places: tuple[int, int, int] | None = None  # of hidden, ids, weights; None: not for native code
        if self.tokens > FEW_TOKENS or not (self.bf16 or hidden.dtype is torch.float32):
            return
        if not (hidden.is_contiguous() and ids.flags.c_contiguous and weights.flags.c_contiguous):
            return
        self.places = hidden.data_ptr(), address(ids), address(weights)

    def is_of(self, sent: Sent) -> bool:
        """Whether it is what is asked with now; its numbers may have changed since."""
        return self.hidden is sent.hidden and self.ids is sent.ids and self.weights is sent.weights


class Flight:
    """One layer on its way."""

    __slots__ = (
        "done", "due", "errors", "experts", "kind", "nodes", "number", "replies", "sent", "since", "strange", "view",
    )  # fmt: skip

    def __init__(
        self, number: int, view: View, experts: int, sent: Sent, kind: Kind, nodes: list[Link | None]
    ) -> None:
        """`number` and `view`: of the native flight; `sent`: what is asked, of a layer with so many `experts`.

        `nodes`: the links to all nodes of the plan.
        """
        self.number, self.view, self.experts, self.sent = number, view, experts, sent
        self.kind, self.nodes = kind, nodes
        self.done: asyncio.Future[None] | None = None  # no share is waited for; None: nobody waits on the event loop
        self.due = 0.0  # seconds of the loop's clock
        self.since: float | None = None  # seconds, `perf_counter`: when somebody began to wait
        self.errors: dict[int, NodeUnavailable] = {}  # by share
        self.strange: dict[int, Rows] = {}  # answers that native code has left to Python
        self.replies: dict[int, asyncio.Future[Trip]] = {}  # by share, while a timeline is recorded

    @property
    def plain(self) -> bool:
        """Whether native code has all answers."""
        return not self.errors and not self.strange

    @property
    def links(self) -> list[Link | None]:
        """Of each share who was asked."""
        return [self.nodes[node] for node in self.view.node[: self.view.shares]]

    def shares(self) -> list[Share]:
        """What each was asked for, as larger layers have it; not once the flight is released."""
        count = self.sent.ids.size
        size = block_size(count, self.experts)
        block = np.ctypeslib.as_array((ctypes.c_int64 * size).from_address(self.view.block)).copy()
        return list(shares_of(block, count, self.experts, self.view.shares).values())

    def trip(self, share: int) -> Trip:
        """When a share that a node has answered was asked for and answered."""
        trip = self.view.trip[share]
        return Trip(*(getattr(trip, name) for name in Trip._fields))

    def node(self, share: int) -> NodeName:
        """Who was asked for a share."""
        link = self.nodes[self.view.node[share]]
        return LOCAL if link is None else link.node
