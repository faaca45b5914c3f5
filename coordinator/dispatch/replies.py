"""What replies say: rows, and how each node does."""

from collections.abc import Callable, Sequence

import torch

from moehive.kernels.ops import Reduction
from moehive.proto.chain import check_chain_reply
from moehive.proto.tensors import Reply, WireError, raw_values, read_values, rounded_values

from ..types import NodeName, NodeUnavailable
from .chain import NotAnswered
from .parts import NodeCounters, Part
from .routing import Share
from .rows import Rows
from .speeds import FEW_TOKENS, Speeds
from .spot_check import SpotCheck
from .tiers import TierView


class Replies:
    """Reads replies, and learns from them."""

    def __init__(
        self,
        reduction: Reduction,
        expert_bytes: Sequence[int],
        tiers: TierView,
        speeds: Speeds,
        spot_check: SpotCheck | None,
        on_lie: Callable[[NodeName, str], None],
    ) -> None:
        """`expert_bytes`: of an expert of each layer."""
        self.counters: dict[NodeName, NodeCounters] = {}
        self._reduction = reduction
        self._expert_bytes = expert_bytes
        self._tiers = tiers
        self._speeds = speeds
        self._spot_check = spot_check
        self._on_lie = on_lie

    def read(self, part: Part, hidden: torch.Tensor, reply: Reply) -> Rows:
        """The rows of a reply to `part` of a layer's `hidden` states.

        Raises NodeUnavailable when a node refused or answered nonsense, which of a chain nobody is blamed for: what
        it was asked is asked of each of its nodes next.
        """
        node, share, head = part.node, part.share, reply.head
        if head.HasField("refusal"):
            about = head.refusal.node_name
            who = next((name for name in part.nodes if name == about), node)
            raise NodeUnavailable(who, f"Node {node} refuses: {head.refusal.sentence[:1024]}")
        count = len(share.pairs) if self._reduction is Reduction.PER_EXPERT else len(share.tokens)
        size, dtype = hidden.shape[1], hidden.dtype
        try:
            raw = raw_values(reply, count, size, dtype)
            if raw is not None:
                rows = Rows.of_bytes(share, node, raw, count, size, dtype)
            elif (rounded := rounded_values(reply, count, size)) is not None:
                rows = Rows.of_rounded(share, node, rounded, count, size)
            else:
                rows = Rows(share, node, read_values(reply, count, size, dtype))
            if part.chained:
                check_chain_reply(head, len(part.members) - 1)
            else:
                self._tiers.note(node, part.layer, head)
        except WireError as error:
            sentence = f"Node {node} answered something else than asked: {error}"
            if not part.chained:
                self._on_lie(node, sentence)
            raise NodeUnavailable(node, sentence) from None
        if part.chained and not rows.finite:
            raise NotAnswered(part.nodes, f"The sum of {', '.join(part.nodes)} is no number in layer {part.layer}.")
        for (name, own), nanoseconds in zip(part.members, (head.compute_ns, *head.chain_ns), strict=True):
            self._note(name, part.layer, own, nanoseconds)
        if self._spot_check is not None:
            self._spot_check.answered(part, hidden, rows, self._reduction, self._speeds.layers)
        return rows

    def failed(self, node: NodeName) -> None:
        """What a node was asked for is computed elsewhere."""
        self.counters_of(node).failed += 1

    def counters_of(self, node: NodeName) -> NodeCounters:
        """A node's counters, which stay where they are."""
        counters = self.counters.get(node)
        if counters is None:
            counters = self.counters[node] = NodeCounters()
        return counters

    def read_bytes(self, layer: int, share: Share) -> int:
        """Bytes of the experts that a share reads, each once; of few tokens, for which alone it is looked at."""
        pairs = len(share.pairs)
        if len(share.tokens) > 1:
            pairs = len(set(share.routing.experts.tolist())) if len(share.tokens) <= FEW_TOKENS else 0
        return pairs * self._expert_bytes[layer]

    def _note(self, node: NodeName, layer: int, share: Share, nanoseconds: int) -> None:
        """A node has computed a share within so much time of its own."""
        counters = self.counters_of(node)
        counters.requests += 1
        counters.expert_calls += len(share.pairs)
        counters.compute_ns += nanoseconds
        nbytes = self.read_bytes(layer, share)
        self._speeds.of(node).note(
            len(share.tokens), len(share.pairs), nbytes, nanoseconds / 1e9, self._speeds.layers
        )
