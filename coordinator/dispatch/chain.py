"""Large chunks of prompts as a chain from node to node, where the coordinator's own link is what limits them.

In a star the coordinator sends the hidden states to every node and gets rows from every node: over N nodes its link
carries N times both. In a chain the first node passes them on to the second and so on, each adds its rows to those of
the nodes after it, and the coordinator gets one sum: its link carries both once, whatever N is. Chunks go in pieces,
so that all links and all nodes work at once.

Whether it is faster is estimated by the links' speed, and then measured: the links between nodes are not known here.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moehive.proto import experts_pb2 as pb
from moehive.proto.chain import MAX_CHAIN, MAX_CHAIN_BYTES, add_to_chain
from moehive.proto.rounding import scale_groups
from moehive.proto.tensors import Routing, head_bytes, routing_bytes, write_head

from ..types import LOCAL, NodeName, NodeUnavailable
from .link import Link
from .parts import Part, Sent
from .placed import LOST
from .routing import Owner, Share, only, split
from .rows import rows_of
from .speeds import Speeds
from .ways import Chunk, Ways, chain_seconds, pieces, star_seconds

log = logging.getLogger(__name__)

MIN_TOKENS = 64
GAIN = 0.8  # a chain is tried when it should take at most this share of the star's time
REST_SECONDS = (10.0, 600.0)  # a node that broke a chain is in none for so long: at first, and at most
FIRST_SECONDS = 10.0  # how long a chunk may take of whose like nothing is known
SLACK_SECONDS = 2.0  # beyond three times what one like it took


class NotAnswered(NodeUnavailable):
    """A part was not answered well; `culprits` are those of its nodes that may be the reason."""

    def __init__(self, culprits: Sequence[NodeName], sentence: str) -> None:
        super().__init__(culprits[0], sentence)
        self.culprits = culprits


class Chains:
    """Decides which chunks go as a chain, and sends those; use it on the event loop's thread."""

    def __init__(self, links: Mapping[NodeName, Link], speeds: Speeds, expert_bytes: Sequence[int]) -> None:
        """`expert_bytes`: of an expert of each layer."""
        self.always: bool | None = None  # a measurement's: every chunk as a chain, or none
        self._links = links
        self._speeds = speeds
        self._expert_bytes = expert_bytes
        self._rests: dict[NodeName, tuple[float, float]] = {}  # until when, by the loop's clock, and for how long
        self._ways: dict[tuple[int, int], Ways] = {}  # by the magnitude of tokens and the number of nodes

    def choose(self, sent: Sent, shares: Mapping[int, Share], names: Sequence[NodeName]) -> list[int]:
        """The nodes, by their index in `names`, that answer a layer together; none: each for itself."""
        tokens = len(sent.ids)
        if tokens < MIN_TOKENS:
            return []
        now = asyncio.get_running_loop().time()
        nodes = [n for n in sorted(shares) if n != LOST and names[n] != LOCAL and self._usable(names[n], now)]
        nodes = nodes[: MAX_CHAIN + 1]
        if len(nodes) < 2:
            return []
        speeds = [self._links[names[node]].speed for node in nodes]
        round_trip = max(speed.round_trip_s for speed in speeds)
        row_s = max(speed.s_per_byte for speed in speeds) * _row_bytes(sent, self._links[names[nodes[0]]])
        read_s = max(self._read_seconds(sent.layer, names[node], shares[node]) for node in nodes)
        star = star_seconds(row_s, [len(shares[node].tokens) for node in nodes], read_s, round_trip)
        if chain_seconds(row_s * tokens, len(nodes), read_s, round_trip) > GAIN * star:
            return []
        ways = self._ways.setdefault((tokens.bit_length(), len(nodes)), Ways())
        way = ways.next() if self.always is None else (ways.chain if self.always else ways.star)
        sent.chunk = Chunk(way, tokens, pieces(row_s * tokens, len(nodes), read_s), now)
        return nodes if way is ways.chain else []

    def send(
        self, sent: Sent, nodes: Sequence[int], names: Sequence[NodeName], owner: Owner, like: pb.ComputeRequest
    ) -> list[Part]:
        """Asks `nodes` for their shares of a layer; what can't be sent is `sent.lost`.

        `like`: a request with all that does not depend on the share.
        """
        assert sent.chunk is not None
        first = self._links[names[nodes[0]]]
        eight_bit = first.speed.eight_bit(sent.hidden.nbytes)
        size = max(1, min(-(-sent.chunk.tokens // sent.chunk.pieces), MAX_CHAIN_BYTES // _row_bytes(sent, first)))
        seconds = sent.chunk.way.s_per_token * sent.chunk.tokens
        patience = 3 * seconds + SLACK_SECONDS if sent.chunk.way.trials else FIRST_SECONDS
        parts = []
        for whole, shares in _pieces(sent, size, nodes, owner):
            members = tuple((names[node], share) for node, share in shares)
            request = pb.ComputeRequest()
            request.CopyFrom(like)
            states = write_head(request, rows_of(sent.hidden, whole), eight_bit)
            try:
                for name, share in members[1:]:
                    add_to_chain(request, name, self._address(name), _over(share, whole))
                own = routing_bytes(_over(members[0][1], whole))
                pieces = head_bytes(request, len(states)), states, own
                reply = self._link(members[0][0]).send(pieces, len(states), chained=len(members) > 1)
            except NodeUnavailable:
                sent.lost.append(whole)
                continue
            parts.append(Part(sent.layer, members, whole, reply, 0.0, sent.chunk.sent_at + patience))
        return parts

    def note(self, sent: Sent) -> None:
        """All of a layer was answered just now."""
        if sent.chunk is not None:
            seconds = asyncio.get_running_loop().time() - sent.chunk.sent_at
            sent.chunk.way.note(seconds / sent.chunk.tokens)

    def answered(self, part: Part) -> None:
        """A chain's nodes have answered well: what they broke before is forgotten."""
        for node in part.nodes:
            self._rests.pop(node, None)

    def rest(self, nodes: Sequence[NodeName]) -> bool:
        """Leaves `nodes` out of chains for a while, each time for longer until they answer well in one.

        False when all of them are left out already.
        """
        now = asyncio.get_running_loop().time()
        first, longest = REST_SECONDS
        news = False
        for node in nodes:
            until, seconds = self._rests.get(node, (0.0, first / 2))
            if until <= now:  # else: another piece of the same chunk
                seconds = min(2 * seconds, longest)
                self._rests[node] = now + seconds, seconds
                news = True
        return news

    def _usable(self, node: NodeName, now: float) -> bool:
        link = self._links.get(node)
        return link is not None and bool(link.speed.slow) and self._rests.get(node, (0.0, 0.0))[0] <= now

    def _read_seconds(self, layer: int, node: NodeName, share: Share) -> float:
        """How long a node reads the experts of its share."""
        experts = len(np.unique(share.routing.experts))
        return experts * self._expert_bytes[layer] * self._speeds.of(node).read_s_per_byte

    def _link(self, node: NodeName) -> Link:
        """Raises NodeUnavailable when the node's link has just gone."""
        link = self._links.get(node)
        if link is None:
            raise NodeUnavailable(node, f"Node {node} is away.")
        return link

    def _address(self, node: NodeName) -> str:
        return self._link(node).address


def _row_bytes(sent: Sent, link: Link) -> int:
    """Bytes of a token's hidden states on a link: with their scales, in 8 bits."""
    columns = sent.hidden.shape[1]
    if link.speed.eight_bit(sent.hidden.nbytes):
        return columns + 4 * scale_groups(columns)
    return columns * sent.hidden.element_size()


def _pieces(
    sent: Sent, size: int, nodes: Sequence[int], owner: Owner
) -> Iterator[tuple[Share, list[tuple[int, Share]]]]:
    """For each `size` tokens of a layer: all that `nodes` compute, and of that each node's own share."""
    k = sent.ids.shape[1]
    everyone = np.zeros(len(owner), dtype=np.int64)
    for start in range(0, len(sent.ids), size):
        ids, weights = sent.ids[start : start + size], sent.weights[start : start + size]
        shares = split(ids, weights, owner)
        mine = [(node, shares[node]) for node in nodes if node in shares]
        if not mine:
            continue
        (whole,) = split(only(ids, [share for _, share in mine]), weights, everyone).values()
        own = [(node, _moved(share, start, k)) for node, share in mine]
        yield _moved(whole, start, k), own


def _moved(share: Share, start: int, k: int) -> Share:
    """A share of a layer's tokens from `start` on, as one of all of its tokens."""
    return Share(share.tokens + start, share.pairs + start * k, share.routing, share.message)


def _over(share: Share, whole: Share) -> Routing:
    """A share's routing over all tokens of `whole`, of which it has some."""
    counts = np.zeros(len(whole.tokens), dtype=np.uint32)
    counts[np.searchsorted(whole.tokens, share.tokens)] = np.diff(share.routing.offsets)
    offsets: npt.NDArray[np.uint32] = np.zeros(len(counts) + 1, dtype=np.uint32)
    np.cumsum(counts, out=offsets[1:])
    return Routing(offsets, share.routing.experts, share.routing.weights)
