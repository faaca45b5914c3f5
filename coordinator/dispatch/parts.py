"""What was asked of the nodes for one layer, until it is answered; and what each node has answered so far."""

import asyncio
import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels.ops import Reduction
from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import Reply
from moehive.proto.wire.messages import Buffer

from ..types import NodeName
from .routing import Share
from .ways import Chunk

WIRE_REDUCTION = {Reduction.PARTIAL_SUM: pb.REDUCTION_PARTIAL_SUM, Reduction.PER_EXPERT: pb.REDUCTION_PER_EXPERT}


class NodeCounters(ctypes.Structure):
    """What one node has done for this coordinator; NodeCounters of cpp/speeds.h, field for field."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("requests", "expert_calls", "compute_ns", "failed"))

    requests: int
    expert_calls: int  # (token, expert) pairs
    compute_ns: int  # the node's own time, as it reports it
    failed: int  # requests that were computed elsewhere in the end


@dataclass(slots=True, eq=False)
class Part:
    """One node's part of a layer, or the part of a chain of nodes, asked for."""

    layer: int
    members: tuple[tuple[NodeName, Share], ...]  # who computes what; the first is asked, the others are its chain
    share: Share  # all of that
    reply: "asyncio.Future[Reply]"
    expected: float  # seconds until the reply
    due: float  # seconds of the loop's clock: it is late from then on
    given_up: bool = False  # `reply` was cancelled because it was late

    @property
    def node(self) -> NodeName:
        """Who was asked."""
        return self.members[0][0]

    @property
    def nodes(self) -> tuple[NodeName, ...]:
        """Who answers."""
        return tuple(name for name, _ in self.members)

    @property
    def chained(self) -> bool:
        """Whether several nodes answer with one sum."""
        return len(self.members) > 1


@dataclass(slots=True)
class Sent:
    """A layer whose messages have left. Dropping it drops the replies that have not come."""

    layer: int
    hidden: torch.Tensor  # [tokens, hidden] on the CPU
    ids: npt.NDArray[np.int64]  # [tokens, k]
    weights: npt.NDArray[np.float32]
    device: torch.device | None  # where its caller has its tensors, if not there
    settle: Callable[[Part], None]  # to be called with each part when it is over
    step: int = 0  # for logs and timelines
    # Of a request for all of `hidden`, in 8 bits or not: its other fields, and its bytes.
    states: dict[bool, tuple[bytes, Buffer]] = field(default_factory=dict)
    here: Share | None = None
    lost: list[Share] = field(default_factory=list)  # of experts that nobody could be asked for
    waiting: list[Part] = field(default_factory=list)
    chunk: Chunk | None = None  # of a prompt, that may go as a chain

    collected: bool = False  # every part is over

    def __del__(self) -> None:
        if self.collected:
            return
        for part in self.waiting:
            self.settle(part)
            part.reply.cancel()  # those that are done stay as they are
