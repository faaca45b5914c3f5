"""A larger layer as a star: one message to each node that is needed, or to a chain's first, and their answers."""

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import torch

from moehive.kernels.ops import Reduction
from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import Reply, head_bytes, write_head
from moehive.proto.wire.messages import Buffer

from .. import timeline
from ..timeline import Trip
from ..types import LOCAL, NodeName, NodeUnavailable
from . import watch
from .card import Card
from .chain import Chains, NotAnswered
from .link import Link
from .local import LocalExperts
from .parts import WIRE_REDUCTION, Part, Sent
from .placed import LOST
from .replies import Replies
from .routes import Routes
from .routing import Owner, Share
from .rows import Rows, rows_of
from .tiers import TierView
from .watch import Watch

log = logging.getLogger(__name__)


class Star:
    """Use it on the event loop's thread."""

    def __init__(
        self,
        local: LocalExperts | None,
        reduction: Reduction,
        routes: Routes,
        replies: Replies,
        tiers: TierView,
        chains: Chains,
        watching: Watch,
        on_failed: Callable[[NodeUnavailable], None],
    ) -> None:
        """`on_failed` hears of each node that did not do what it was asked."""
        self._local = local
        self._reduction = reduction
        self._routes = routes
        self._speeds = routes.speeds
        self._links = routes.asking.links
        self._replies = replies
        self._tiers = tiers
        self._chains = chains
        self._watch = watching
        self._on_failed = on_failed
        self._card = Card()

    def ask_chain(self, sent: Sent, shares: dict[int, Share], owner: Owner) -> None:
        """Sends what goes as a chain, and takes it out of `shares`."""
        names = self._routes.placed.names
        nodes = self._chains.choose(sent, shares, names)
        if not nodes:
            return
        sent_at = perf_counter_ns()
        for part in self._chains.send(sent, nodes, names, owner, self._request(sent)):
            _show(part.node, sent, sent_at, part.reply)
            self._watch.add(part)
            sent.waiting.append(part)
        for node in nodes:
            del shares[node]

    def ask(self, sent: Sent, shares: dict[int, Share]) -> None:
        """Sends each node its share; those that can't be sent are `sent.lost`."""
        names = self._routes.placed.names
        asked: list[tuple[Link, Share, asyncio.Future[Any], float]] = []
        try:
            for index, share in shares.items():
                if index == LOST:
                    sent.lost.append(share)
                elif names[index] == LOCAL:
                    sent.here = share
                else:
                    try:
                        asked.append(self._send(names[index], sent, share))
                    except NodeUnavailable:
                        sent.lost.append(share)
        finally:
            for link, share, reply, later in asked:  # while the nodes work
                sent.waiting.append(self._expect(link, sent, share, reply, later))

    async def answers(self, sent: Sent) -> tuple[list[Rows], list[Share]]:
        """What was asked for: rows, and the shares that failed."""
        parts: list[Rows] = []
        failed = list(sent.lost)
        if sent.here is not None:
            await asyncio.sleep(0)  # the messages leave before this thread computes
            with timeline.current.span("local experts"):
                values = self.here(sent.layer, sent.hidden, sent.here)
                parts.append(Rows(sent.here, None, values))
        for part in sent.waiting:
            try:
                with timeline.current.span("waiting"):
                    answer = await part.reply
                with timeline.current.span("reading"):
                    parts.append(self._replies.read(part, sent.hidden, answer))
                if part.chained:
                    self._chains.answered(part)
            except NodeUnavailable as error:
                self._failed(part, error)
                failed.append(part.share)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not part.given_up or (task is not None and task.cancelling()):
                    raise
                self._failed(part, NotAnswered(part.nodes, f"Node {part.node} is late; others are asked."))
                failed.append(part.share)
            finally:
                self.settle(part)
        sent.collected = True
        return parts, failed

    def here(self, layer: int, hidden: torch.Tensor, share: Share) -> torch.Tensor:
        """The rows of this process's own share of a layer's `hidden` states, in their type."""
        assert self._local is not None
        values = self._local.compute(layer, rows_of(hidden, share), share.routing, self._reduction)
        counters = self._replies.counters_of(LOCAL)
        counters.requests += 1
        counters.expert_calls = self._local.expert_calls
        counters.compute_ns = self._local.compute_ns
        return values

    def settle(self, part: Part) -> None:
        """A part is over, however it ended."""
        self._watch.remove(part)
        self._speeds.of(part.node).backlog_s -= part.expected
        part.expected = 0.0

    def _send(self, node: NodeName, sent: Sent, share: Share) -> tuple[Link, Share, asyncio.Future[Any], float]:
        """Also for how many seconds it is held back. Raises NodeUnavailable when the node's link has just gone."""
        link = self._links.get(node)
        if link is None:
            raise NodeUnavailable(node, f"Node {node} is away.")
        whole = len(share.tokens) == len(sent.ids)  # the usual case of decoding: each node gets the same bytes
        rows = sent.hidden if whole else rows_of(sent.hidden, share)
        # Where the bits of a result must not depend on the cluster, they must not depend on a link's speed either.
        exact = self._reduction is Reduction.PER_EXPERT or not link.speed.slow
        eight_bit = not exact and link.speed.eight_bit(rows.nbytes)
        head, raw = (sent.states.get(eight_bit) if whole else None) or self._head(sent, rows, eight_bit)
        later = self._card.turn(link.speed, len(raw), asyncio.get_running_loop().time())
        sent_at = perf_counter_ns() + int(later * 1e9)
        reply = link.send((head, raw, share.message), len(raw), later=later)
        _show(node, sent, sent_at, reply)
        return link, share, reply, later

    def _expect(self, link: Link, sent: Sent, share: Share, reply: asyncio.Future[Any], later: float) -> Part:
        """What was just asked of a node, or will be `later`, and by when it should be answered."""
        speed = self._speeds.of(link.node)
        nbytes = self._replies.read_bytes(sent.layer, share)
        expected = speed.expected(len(share.tokens), len(share.pairs), nbytes)
        if expected is None:
            expected, patience = 0.0, watch.FIRST_SECONDS
        else:
            patience = 3 * (speed.backlog_s + expected + link.speed.round_trip_s) + watch.SLACK_SECONDS
        speed.backlog_s += expected
        due = asyncio.get_running_loop().time() + later + patience
        part = Part(sent.layer, ((link.node, share),), share, reply, expected, due)
        self._watch.add(part)
        return part

    def _head(self, sent: Sent, rows: torch.Tensor, eight_bit: bool) -> tuple[bytes, Buffer]:
        """A request up to its hidden states `rows`, and those, as bytes."""
        request = self._request(sent)
        raw = write_head(request, rows, eight_bit)
        self._tiers.tell(request)
        states = head_bytes(request, len(raw)), raw
        if rows is sent.hidden:
            sent.states[eight_bit] = states
        return states

    def _request(self, sent: Sent) -> pb.ComputeRequest:
        """A request of a layer, without its share."""
        return pb.ComputeRequest(
            epoch=self._routes.epoch, step=sent.step, layer=sent.layer, reduction=WIRE_REDUCTION[self._reduction]
        )

    def _failed(self, part: Part, error: NodeUnavailable) -> None:
        """A part did not come: its node is not asked until it has answered a probe, or its nodes as no chain."""
        if part.chained:
            culprits = error.culprits if isinstance(error, NotAnswered) else (NodeName(error.node),)
            if self._chains.rest(culprits):
                log.warning("A chain of nodes was broken; they are asked one by one. %s", error)
            return
        self._on_failed(NodeUnavailable(part.node, str(error)))


def _show(node: NodeName, sent: Sent, sent_at: int, reply: "asyncio.Future[Reply]") -> None:
    """Shows a request on the timeline, if one is recorded."""
    if not timeline.current.on:
        return

    def trip(reply: Reply) -> Trip:
        head, came = reply.head, perf_counter_ns()
        return Trip(
            sent_at, came, came, head.began_ns, head.reading_ns, head.waited_ns, head.compute_ns, head.wrote_ns
        )

    timeline.current.hop(node, sent.layer, reply, trip)
