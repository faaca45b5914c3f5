"""One layer over the cluster: tokens by node, one message to each node that is needed, the partial sums added up.

The order of addition is fixed. With REDUCTION_PARTIAL_SUM it follows the nodes' names, so a placement gives the same
bits every time while no link is so slow that hidden states travel in 8 bits and no node fails; with
REDUCTION_PER_EXPERT it follows the router's top-k, so every placement gives the same bits, whatever fails.

A node that fails a request (it is gone, silent, refuses, or answers nonsense) is not asked for a while, and what it
was asked for goes to other holders, else to the coordinator's fallback; a layer that nobody can compute waits.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Generator
from operator import attrgetter
from typing import Any, cast

import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.ops import Reduction
from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import head_bytes, write_head
from moehive.proto.wire.messages import Buffer

from .. import timeline
from ..types import LOCAL, CoordinatorError, NodeName, NodeUnavailable, Plan
from .chain import Chains, NotAnswered
from .fallback import Fallback
from .flights import Flight, Flights
from .link import Link
from .local import LocalExperts
from .parts import Part, Sent
from .placed import LOST
from .replies import Replies
from .routes import Routes
from .routing import Owner, Share, only, pieces, split
from .rows import Rows, Sum, add_up, array, is_finite, rows_of
from .spot_check import SpotCheck
from .statistics import RoutingStatistics
from .tiers import TierView
from .watch import Due, Watch

log = logging.getLogger(__name__)

WAIT_SECONDS = 120.0  # a layer waits so long for somebody who can compute it, then its requests end with a sentence
SLACK_SECONDS = 0.05  # beyond three times the expected time, a node with replicas is late
SILENT_SECONDS = 1.0  # beyond that, one without replicas
FIRST_SECONDS = 10.0  # for a request of which nothing is known: the node's first, its memory cold

_COMPUTE_NS = attrgetter("head.compute_ns")
_WIRE_REDUCTION = {Reduction.PARTIAL_SUM: pb.REDUCTION_PARTIAL_SUM, Reduction.PER_EXPERT: pb.REDUCTION_PER_EXPERT}


class Dispatcher:
    """The `ExpertBackend` of a cluster (models/base.py)."""

    def __init__(
        self,
        manifest: Manifest,
        local: LocalExperts | None,
        reduction: Reduction,
        fallback: Fallback | None = None,
        on_lie: Callable[[NodeName, str], None] = lambda node, sentence: None,
        wait_seconds: float = WAIT_SECONDS,
        cache_margin: float = 0.0,
        read: Callable[[ExpertId], torch.Tensor] | None = None,
    ) -> None:
        """`on_lie` hears of nodes that answered what cannot be true, with a sentence.

        `read` gives an expert's blob, for checks of what nodes answer; None: nothing is computed again.
        `cache_margin`: of cache-aware routing, see models/lean/foresight.py; 0: off.
        """
        self.tiers = TierView([layer.experts for layer in manifest.layers], cache_margin)
        self._local = local
        self._reduction = reduction
        self._fallback = fallback
        self._on_lie = on_lie
        self._wait_seconds = wait_seconds
        self._expert_bytes = [layer.expert_bytes for layer in manifest.layers]
        self._routes = Routes(self._expert_bytes, local is not None, self._routes_changed)
        self._speeds = self._routes.speeds
        self._links = self._routes.asking.links
        self.chains = Chains(self._links, self._speeds, self._expert_bytes)
        self._spot_check = None if read is None else SpotCheck(manifest, read, self._lied, self.chains.rest)
        self._replies = Replies(reduction, self._expert_bytes, self.tiers, self._speeds, self._spot_check, self._lied)
        self.counters = self._replies.counters
        self._lost_before = 0
        self._watch = Watch(self._late)
        patience = SLACK_SECONDS, SILENT_SECONDS, FIRST_SECONDS
        self._flights = Flights(
            manifest, reduction, self._routes, self._replies, self._watch, patience, self._share_failed
        )
        self.statistics = RoutingStatistics([layer.experts for layer in manifest.layers], manifest.layers[0].top_k)
        self._step = 0
        self.longest_pause_s = 0.0  # from the first failure in a layer to its sum

    @property
    def epoch(self) -> int:
        """The plan that is dispatched by; 0 before the first."""
        return self._routes.epoch

    @property
    def lost(self) -> int:
        """Experts of the plan that no node can be asked for now."""
        return self._routes.lost

    @property
    def busy(self) -> bool:
        """Whether layers are being asked for, of nodes that hold all of them."""
        return self._routes.lost == 0 and self._watch.active

    async def prepare(self, plan: Plan) -> None:
        """Makes ready to follow `plan` later, on a thread: with many experts it takes a while."""
        await self._routes.prepare(plan)

    def follow(self, plan: Plan, holding: Collection[NodeName] | None = None) -> None:
        """Dispatches by `plan` from the next layer on; asks those that are `holding` their slices (None: all)."""
        self._routes.follow(plan, holding)

    async def stop(self) -> None:
        """Ends what goes on in the background."""
        if self._spot_check is not None:
            await self._spot_check.stop()

    def connect(self, link: Link) -> None:
        """Uses `link` for its node, in place of an older one."""
        link.flights = self._flights
        self._routes.asking.connect(link)

    def disconnect(self, link: Link) -> None:
        """Forgets `link` if it is still its node's."""
        self._routes.asking.disconnect(link)
        self.tiers.forget(link.node)

    def holding(self, nodes: Collection[NodeName]) -> None:
        """From now on only these hold their slice of the plan in force."""
        self._routes.holding(nodes)

    def link(self, node: NodeName) -> Link | None:
        """The node's link, if it is connected."""
        return self._links.get(node)

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        """See ExpertBackend.submit. Raises NotReady before the first plan."""
        with timeline.current.span("submit"):
            here = hidden.is_cpu
            host = hidden if here else hidden.cpu()
            device = None if here else hidden.device
            numbers = array(ids, torch.int64)
            factors = array(weights, torch.float32)
            self._step += 1
            self._routes.tick()
            if self._may_fly() and (flight := self._flights.begin(layer, self._step, host, numbers, factors, device)):
                self.statistics.note(layer, numbers)  # while the nodes work
                return _Landing(self, self._flights, flight)
            return _Answer(self, self._submit(Sent(layer, host, numbers, factors, device, self._settle)))

    def _may_fly(self) -> bool:
        """Whether the next layer's messages and answers need nothing but what flights know of."""
        if self.tiers.telling or self.tiers.slow:
            return False
        return self._spot_check is None or not self._spot_check.wants(self._speeds.layers)

    def _submit(self, sent: Sent) -> Sent:
        layer, numbers, factors = sent.layer, sent.ids, sent.weights
        owner = self._routes.owner(layer, numbers)
        shares = split(numbers, factors, owner)
        if self._reduction is Reduction.PARTIAL_SUM:
            self._ask_chain(sent, shares, owner)
        self._ask(sent, shares)
        self.tiers.sent()
        self.statistics.note(layer, numbers)  # while the nodes work
        return sent

    async def _collect(self, sent: Sent) -> torch.Tensor:
        parts, failed = await self._answers(sent)
        if failed:
            parts += await self._recover(sent, failed)
        else:
            self.chains.note(sent)
        return await self._added_up(sent, parts)

    async def _land(self, flight: Flight) -> torch.Tensor:
        """As `_collect`, of a flight."""
        if flight.view.here >= 0:
            await asyncio.sleep(0)  # the messages leave before this thread computes
            with timeline.current.span("local experts"):
                share = flight.shares()[flight.view.here]
                self._flights.put(flight, self._here(flight.layer, flight.hidden, share))
        with timeline.current.span("wait"):
            await flight.done
        if flight.plain:
            with timeline.current.span("add up"):
                total, finite = self._flights.sum(flight)
            if finite:
                return total if flight.device is None else total.to(flight.device)
        sent, parts, failed = self._flights.apart(flight, self._settle)
        self._flights.release(flight)
        if failed:
            parts += await self._recover(sent, failed)
        return await self._added_up(sent, parts)

    async def _added_up(self, sent: Sent, parts: list[Rows]) -> torch.Tensor:
        with timeline.current.span("add up"):
            total, finite = self._sum(parts, sent)
        if not finite:
            total, _ = self._sum(await self._check(sent, parts), sent)
        return total if sent.device is None else total.to(sent.device)

    async def _answers(self, sent: Sent) -> tuple[list[Rows], list[Share]]:
        """What was asked for: rows, and the shares that failed."""
        parts: list[Rows] = []
        failed = list(sent.lost)
        if sent.here is not None:
            await asyncio.sleep(0)  # the messages leave before this thread computes
            with timeline.current.span("local experts"):
                values = self._here(sent.layer, sent.hidden, sent.here)
                parts.append(Rows(sent.here, None, values))
        for part in sent.waiting:
            try:
                with timeline.current.span("wait"):
                    answer = await part.reply
                with timeline.current.span("read"):
                    parts.append(self._replies.read(part, sent.hidden, answer))
                if part.chained:
                    self.chains.answered(part)
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
                self._settle(part)
        sent.collected = True
        return parts, failed

    def _ask_chain(self, sent: Sent, shares: dict[int, Share], owner: Owner) -> None:
        """Sends what goes as a chain, and takes it out of `shares`."""
        names = self._routes.placed.names
        nodes = self.chains.choose(sent, shares, names)
        if not nodes:
            return
        for part in self.chains.send(sent, nodes, names, owner, self._request(sent.layer)):
            timeline.current.hop(part.node, part.reply, _COMPUTE_NS)
            self._watch.add(part)
            sent.waiting.append(part)
        for node in nodes:
            del shares[node]

    def _ask(self, sent: Sent, shares: dict[int, Share]) -> None:
        """Sends each node its share; those that can't be sent are `sent.lost`."""
        names = self._routes.placed.names
        asked: list[tuple[Link, Share, asyncio.Future[Any]]] = []
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
            for link, share, reply in asked:  # while the nodes work
                sent.waiting.append(self._expect(link, sent, share, reply))

    async def _recover(self, sent: Sent, failed: list[Share], avoid: frozenset[NodeName] = frozenset()) -> list[Rows]:
        """The rows of `failed` from whoever else has the experts, but not from `avoid`.

        Raises NodeUnavailable when nobody could compute them for `wait_seconds`.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        parts: list[Rows] = []
        while failed:
            ids = only(sent.ids, failed)
            again = Sent(sent.layer, sent.hidden, ids, sent.weights, sent.device, self._settle)
            self._ask(again, split(ids, sent.weights, self._routes.owner(sent.layer, ids, avoid)))
            lost, again.lost = again.lost, []
            for share in lost:
                parts += await self._last_resort(again, share, avoid, started + self._wait_seconds)
            done, failed = await self._answers(again)
            parts += done
        self.longest_pause_s = max(self.longest_pause_s, loop.time() - started)
        return parts

    async def _last_resort(
        self, sent: Sent, share: Share, avoid: Collection[NodeName], deadline: float
    ) -> list[Rows]:
        """Rows of experts that nobody can be asked for: read here, else asked for once somebody is back.

        Raises NodeUnavailable at `deadline`.
        """
        fallback = self._fallback
        if fallback is not None and (at_once := fallback.experts_at_once(sent.layer)) > 0:
            try:
                done: list[Rows] = []
                for piece in pieces(sent.ids, sent.weights, share, at_once):
                    hidden = rows_of(sent.hidden, piece)
                    values = await fallback.compute(sent.layer, hidden, piece.routing, self._reduction)
                    done.append(Rows(piece, None, values))
                return done
            except (CoordinatorError, OSError, MemoryError) as error:
                log.warning("Experts of layer %d could not be read from the checkpoint: %s", sent.layer, error)
        while not self._routes.placed.held_without(sent.layer, share.routing.experts, avoid):
            try:
                async with asyncio.timeout_at(deadline):
                    await self._routes.change()
            except TimeoutError:
                raise self._routes.unavailable(sent.layer, int(share.routing.experts[0])) from None
        sent.lost.append(share)  # to be asked for again
        return []

    async def _check(self, sent: Sent, parts: list[Rows]) -> list[Rows]:
        """Rows that are not numbers are computed by others; if theirs are, the nodes have lied."""
        if not bool(torch.isfinite(sent.hidden).all()):
            return parts  # what was asked was no number
        suspects: frozenset[NodeName] = frozenset()
        while damaged := [rows for rows in parts if rows.node is not None and not is_finite(rows.values.float())]:
            suspects |= {rows.node for rows in damaged if rows.node is not None}
            parts = [rows for rows in parts if not any(rows is bad for bad in damaged)]
            parts += await self._recover(sent, [rows.share for rows in damaged], suspects)
        if all(is_finite(rows.values.float()) for rows in parts):
            for node in suspects:
                self._lied(node, f"Node {node} answered values that are not numbers in layer {sent.layer}.")
        return parts

    def _here(self, layer: int, hidden: torch.Tensor, share: Share) -> torch.Tensor:
        assert self._local is not None
        values = self._local.compute(layer, rows_of(hidden, share), share.routing, self._reduction)
        counters = self._replies.counters_of(LOCAL)
        counters.requests += 1
        counters.expert_calls = self._local.expert_calls
        counters.compute_ns = self._local.compute_ns
        return values

    def _send(self, node: NodeName, sent: Sent, share: Share) -> tuple[Link, Share, asyncio.Future[Any]]:
        """Raises NodeUnavailable when the node's link has just gone."""
        link = self._links.get(node)
        if link is None:
            raise NodeUnavailable(node, f"Node {node} is away.")
        whole = len(share.tokens) == len(sent.ids)  # the usual case of decoding: each node gets the same bytes
        rows = sent.hidden if whole else rows_of(sent.hidden, share)
        # Where the bits of a result must not depend on the cluster, they must not depend on a link's speed either.
        exact = self._reduction is Reduction.PER_EXPERT or not link.speed.slow
        eight_bit = not exact and link.speed.eight_bit(rows.nbytes)
        head, raw = (sent.states.get(eight_bit) if whole else None) or self._head(sent, rows, eight_bit)
        reply = link.send((head, raw, share.message), len(raw))
        timeline.current.hop(node, reply, _COMPUTE_NS)
        return link, share, reply

    def _expect(self, link: Link, sent: Sent, share: Share, reply: asyncio.Future[Any]) -> Part:
        """What was just asked of a node, and by when it should be answered."""
        speed = self._speeds.of(link.node)
        nbytes = self._replies.read_bytes(sent.layer, share)
        expected = speed.expected(len(share.tokens), len(share.pairs), nbytes)
        if expected is None:
            expected, patience = 0.0, FIRST_SECONDS
        else:
            patience = 3 * (speed.backlog_s + expected + link.speed.round_trip_s) + SLACK_SECONDS
        speed.backlog_s += expected
        due = asyncio.get_running_loop().time() + patience
        part = Part(sent.layer, ((link.node, share),), share, reply, expected, due)
        self._watch.add(part)
        return part

    def _head(self, sent: Sent, rows: torch.Tensor, eight_bit: bool) -> tuple[bytes, Buffer]:
        """A request up to its hidden states `rows`, and those, as bytes."""
        request = self._request(sent.layer)
        raw = write_head(request, rows, eight_bit)
        self.tiers.tell(request)
        states = head_bytes(request, len(raw)), raw
        if rows is sent.hidden:
            sent.states[eight_bit] = states
        return states

    def _request(self, layer: int) -> pb.ComputeRequest:
        """A request of the layer that is dispatched now, without its share."""
        return pb.ComputeRequest(
            epoch=self.epoch, step=self._step, layer=layer, reduction=_WIRE_REDUCTION[self._reduction]
        )

    def _settle(self, part: Part) -> None:
        """A part is over, however it ended."""
        self._watch.remove(part)
        self._speeds.of(part.node).backlog_s -= part.expected
        part.expected = 0.0

    def _failed(self, part: Part, error: NodeUnavailable) -> None:
        """A part did not come: its node is not asked until it has answered a probe, or its nodes as no chain."""
        if part.chained:
            culprits = error.culprits if isinstance(error, NotAnswered) else (NodeName(error.node),)
            if self.chains.rest(culprits):
                log.warning("A chain of nodes was broken; they are asked one by one. %s", error)
            return
        self._share_failed(NodeUnavailable(part.node, str(error)))

    def _share_failed(self, error: NodeUnavailable) -> None:
        """A node did not do what it was asked."""
        node = NodeName(error.node)
        self._replies.failed(node)
        if self._routes.asking.shun(node):
            log.warning("%s", error)

    def _lied(self, node: NodeName, sentence: str) -> None:
        self._routes.asking.shun(node)
        self._on_lie(node, sentence)

    def _late(self, thing: Due) -> None:
        """A part's time is over: gives it up, at once when its experts are elsewhere too, else a little later."""
        if isinstance(thing, Flight):
            self._flights.late(thing)
            return
        part = cast(Part, thing)
        if part.reply.done():
            self._watch.remove(part)
            return
        now = asyncio.get_running_loop().time()
        experts = part.share.routing.experts
        elsewhere = part.chained or self._routes.placed.held_without(part.layer, experts, (part.node,))
        if not elsewhere and now < part.due + SILENT_SECONDS:
            return
        part.given_up = True
        part.reply.cancel()

    def _routes_changed(self) -> None:
        """Experts that nobody can be asked for are read ahead, the most used ones first."""
        self._flights.routes_changed()
        lost, before = self._routes.lost, self._lost_before
        self._lost_before = lost
        if self._fallback is None:
            return
        if lost == 0:
            self._fallback.rest()
        elif lost != before:
            placed = self._routes.placed
            missing = [
                (-float(counts[expert]), layer, expert)
                for layer in range(len(self._expert_bytes))
                if (numbers := placed.lost_experts(layer))
                for counts in (self.statistics.counts(layer),)
                for expert in numbers
            ]
            self._fallback.prefetch([ExpertId(layer, expert) for _, layer, expert in sorted(missing)])

    def _sum(self, parts: list[Rows], sent: Sent) -> Sum:
        (tokens, k), size = sent.ids.shape, sent.hidden.shape[1]
        return add_up(parts, tokens, k, size, sent.hidden.dtype, self._reduction)


class _Answer:
    """The sum that `submit` promises: awaiting it, once, collects."""

    def __init__(self, dispatcher: Dispatcher, sent: Sent) -> None:
        self._dispatcher = dispatcher
        self._sent = sent

    def __await__(self) -> Generator[Any, None, torch.Tensor]:
        return self._dispatcher._collect(self._sent).__await__()


class _Landing:
    """As `_Answer`, of a flight, which is over when this is dropped."""

    def __init__(self, dispatcher: Dispatcher, flights: Flights, flight: Flight) -> None:
        self._dispatcher = dispatcher
        self._flights = flights
        self._flight = flight

    def __await__(self) -> Generator[Any, None, torch.Tensor]:
        return self._land().__await__()

    async def _land(self) -> torch.Tensor:
        return await self._dispatcher._land(self._flight)

    def __del__(self) -> None:
        self._flights.release(self._flight)
