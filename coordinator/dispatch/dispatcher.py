"""One layer over the cluster: tokens by node, one message to each node that is needed, the partial sums added up.

The order of addition is fixed. With REDUCTION_PARTIAL_SUM it follows the nodes' names, so a placement gives the same
bits every time while no link is so slow that hidden states travel in 8 bits; with REDUCTION_PER_EXPERT it follows the
router's top-k, so every placement gives the same bits.
"""

import asyncio
from collections.abc import Awaitable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels.geometry import Manifest
from moehive.kernels.ops import Reduction
from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import WireError, read_values, write_request

from .. import timeline
from ..types import LOCAL, NodeName, NodeUnavailable, NotReady, Plan
from .link import Link
from .local import LocalExperts
from .routing import Share, split

_WIRE_REDUCTION = {
    Reduction.PARTIAL_SUM: pb.REDUCTION_PARTIAL_SUM,
    Reduction.PER_EXPERT: pb.REDUCTION_PER_EXPERT,
}


@dataclass(slots=True)
class NodeCounters:
    """What one node has done for this coordinator."""

    requests: int = 0
    expert_calls: int = 0  # (token, expert) pairs
    compute_ns: int = 0  # the node's own time, as it reports it


@dataclass(slots=True)
class _Sent:
    """A layer whose messages have left. Dropping it drops the replies that have not come."""

    layer: int
    hidden: torch.Tensor
    top_k: int
    device: torch.device
    here: Share | None = None
    waiting: list[tuple[NodeName, Share, "asyncio.Future[pb.ComputeReply]"]] = field(default_factory=list)

    def __del__(self) -> None:
        for _, _, reply in self.waiting:
            reply.cancel()  # those that are done stay as they are


class Dispatcher:
    """The `ExpertBackend` of a cluster (models/base.py)."""

    def __init__(self, manifest: Manifest, local: LocalExperts | None, reduction: Reduction) -> None:
        self._manifest = manifest
        self._local = local
        self._reduction = reduction
        self._links: dict[NodeName, Link] = {}
        self._plan: Plan | None = None
        self._names: tuple[NodeName, ...] = ()
        self._owners: list[npt.NDArray[np.int64]] = []  # for each layer, the node's index for each expert
        self._step = 0
        self.counters: dict[NodeName, NodeCounters] = {}

    @property
    def epoch(self) -> int:
        """The plan that is dispatched by; 0 before the first."""
        return self._plan.epoch if self._plan is not None else 0

    def follow(self, plan: Plan) -> None:
        """Dispatches by `plan` from the next layer on."""
        self._plan = plan
        self._choose_owners()

    def connect(self, link: Link) -> None:
        """Uses `link` for its node, in place of an older one."""
        self._links[link.node] = link
        self._choose_owners()

    def disconnect(self, link: Link) -> None:
        """Forgets `link` if it is still its node's."""
        if self._links.get(link.node) is link:
            del self._links[link.node]
            self._choose_owners()

    def link(self, node: NodeName) -> Link | None:
        """The node's link, if it is connected."""
        return self._links.get(node)

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        """See ExpertBackend.submit. Raises NotReady before the first plan."""
        if self._plan is None:
            raise NotReady("The cluster does not hold the model yet; `moehive status` says what is missing.")
        with timeline.current.span("submit"):
            return _Answer(self, self._submit(layer, hidden, ids, weights))

    def _submit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> "_Sent":
        host = hidden if hidden.device.type == "cpu" else hidden.cpu()
        shares = split(
            ids.to("cpu", torch.int64).numpy(), weights.to("cpu", torch.float32).numpy(), self._owners[layer]
        )
        self._step += 1
        sent = _Sent(layer, host, ids.shape[1], hidden.device)
        for index, share in shares.items():
            node = self._names[index]
            if node == LOCAL:
                sent.here = share
            else:
                sent.waiting.append((node, share, self._send(node, layer, host, share)))
        return sent

    async def _collect(self, sent: "_Sent") -> torch.Tensor:
        parts: list[tuple[Share, torch.Tensor]] = []
        if sent.here is not None:
            await asyncio.sleep(0)  # the messages leave before this thread computes
            with timeline.current.span("local experts"):
                parts.append((sent.here, self._here(sent.layer, sent.hidden, sent.here)))
        for node, share, reply in sent.waiting:
            with timeline.current.span("wait"):
                answer = await reply
            with timeline.current.span("read"):
                parts.append((share, self._values(node, share, sent.hidden, answer)))
        with timeline.current.span("add up"):
            return self._add_up(parts, sent.hidden, sent.top_k).to(sent.device)

    def _add_up(self, parts: list[tuple[Share, torch.Tensor]], hidden: torch.Tensor, k: int) -> torch.Tensor:
        tokens, size = hidden.shape
        if self._reduction is Reduction.PER_EXPERT:
            pairs = torch.zeros((tokens * k, size), dtype=torch.float32)
            for share, values in parts:
                pairs[torch.from_numpy(share.pairs)] = values.float()
            total = pairs.view(tokens, k, size).sum(dim=1)
        else:
            rest = iter(parts)
            if parts and len(parts[0][0].tokens) == tokens:
                total = next(rest)[1].to(torch.float32, copy=True)  # a reply's own rows are not to be written to
            else:
                total = torch.zeros((tokens, size), dtype=torch.float32)
            for share, values in rest:
                if len(share.tokens) == tokens:
                    total += values
                else:
                    total.index_add_(0, torch.from_numpy(share.tokens), values.float())
        return total.to(hidden.dtype)

    def _here(self, layer: int, hidden: torch.Tensor, share: Share) -> torch.Tensor:
        assert self._local is not None
        values = self._local.compute(layer, _rows(hidden, share), share.routing, self._reduction)
        counters = self.counters.setdefault(LOCAL, NodeCounters())
        counters.requests += 1
        counters.expert_calls = self._local.expert_calls
        counters.compute_ns = self._local.compute_ns
        return values

    def _send(
        self, node: NodeName, layer: int, hidden: torch.Tensor, share: Share
    ) -> "asyncio.Future[pb.ComputeReply]":
        link = self._links.get(node)
        if link is None:
            raise NodeUnavailable(
                node,
                f"Node {node} is away, and it holds experts that this request needs; "
                "the request can be sent again once it is back.",
            )
        request = pb.ComputeRequest(
            epoch=self.epoch, step=self._step, layer=layer, reduction=_WIRE_REDUCTION[self._reduction]
        )
        rows = _rows(hidden, share)
        # Where the bits of a result must not depend on the cluster, they must not depend on a link's speed either.
        eight_bit = self._reduction is Reduction.PARTIAL_SUM and link.speed.eight_bit(rows.nbytes)
        write_request(request, rows, share.routing, eight_bit)
        reply = link.send(request)
        timeline.current.hop(node, reply, _compute_ns)
        return reply

    def _values(self, node: NodeName, share: Share, hidden: torch.Tensor, reply: pb.ComputeReply) -> torch.Tensor:
        """The rows of a reply to `share`. Raises NodeUnavailable when the node refused or answered nonsense."""
        if reply.HasField("refusal"):
            raise NodeUnavailable(node, f"Node {node} refuses: {reply.refusal.sentence[:1024]}")
        rows = len(share.pairs) if self._reduction is Reduction.PER_EXPERT else len(share.tokens)
        try:
            values = read_values(reply, rows, hidden.shape[1], hidden.dtype)
        except WireError as error:
            raise NodeUnavailable(node, f"Node {node} answered something else than asked: {error}") from None
        counters = self.counters.setdefault(node, NodeCounters())
        counters.requests += 1
        counters.expert_calls += len(share.pairs)
        counters.compute_ns += reply.compute_ns
        return values

    def _choose_owners(self) -> None:
        """For each expert the first owner that is there, else its first owner (whose absence is then the error)."""
        if self._plan is None:
            return
        names = sorted({node for layer in self._plan.owners for nodes in layer for node in nodes})
        index = {name: i for i, name in enumerate(names)}

        def choose(nodes: tuple[NodeName, ...]) -> int:
            there = (n for n in nodes if n == LOCAL or n in self._links)
            return index[next(there, nodes[0])]

        self._names = tuple(names)
        self._owners = [np.array([choose(nodes) for nodes in layer], dtype=np.int64) for layer in self._plan.owners]


class _Answer:
    """The sum that `submit` promises: awaiting it, once, collects."""

    def __init__(self, dispatcher: Dispatcher, sent: _Sent) -> None:
        self._dispatcher = dispatcher
        self._sent = sent

    def __await__(self) -> Generator[Any, None, torch.Tensor]:
        return self._dispatcher._collect(self._sent).__await__()


def _compute_ns(reply: pb.ComputeReply) -> int:
    return reply.compute_ns


def _rows(hidden: torch.Tensor, share: Share) -> torch.Tensor:
    if len(share.tokens) == hidden.shape[0]:
        return hidden
    return hidden[torch.from_numpy(share.tokens)]
