"""One layer over the cluster: tokens by node, one message to each node that is needed, the partial sums added up.

The order of addition is fixed. With REDUCTION_PARTIAL_SUM it follows the nodes' names, so a placement gives the same
bits every time while no link is so slow that hidden states travel in 8 bits and no node fails; with
REDUCTION_PER_EXPERT it follows the router's top-k, so every placement gives the same bits, whatever fails.

A node that fails a request (it is gone, silent, refuses, or answers nonsense) is not asked for a while, and what it
was asked for goes to other holders, else to the coordinator's fallback; a layer that nobody can compute waits.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Generator
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.ops import Reduction

from .. import timeline
from ..types import NodeName, NodeUnavailable, Plan
from . import watch
from .chain import Chains
from .fallback import Fallback
from .flight import Flight
from .flights import Flights
from .link import Link
from .local import LocalExperts
from .parts import Part, Sent
from .recovery import Recovery
from .replies import Replies
from .routes import Routes
from .routing import split
from .rows import Rows, add_up, array
from .spot_check import SpotCheck
from .star import Star
from .statistics import RoutingStatistics
from .tiers import TierView
from .watch import Due, Watch

log = logging.getLogger(__name__)

_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: None)  # not every system has it
# A trunk's ids and weights, which it uses for one layer after the other, and as arrays.
_Choice: TypeAlias = tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.int64], npt.NDArray[np.float32]]

WAIT_SECONDS = 120.0  # a layer waits so long for somebody who can compute it, then its requests end with a sentence


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
        self._reduction = reduction
        self._fallback = fallback
        self._on_lie = on_lie
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
        self._flights = Flights(manifest, reduction, self._routes, self._replies, self._watch, self._failed)
        self._star = Star(
            local, reduction, self._routes, self._replies, self.tiers, self.chains, self._watch, self._failed
        )
        self._recovery = Recovery(self._star, self._routes, reduction, fallback, self._lied, wait_seconds)
        self.statistics = RoutingStatistics([layer.experts for layer in manifest.layers], manifest.layers[0].top_k)
        self._step = 0
        self._choice: _Choice | None = None

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
        return self._routes.lost == 0 and (self._watch.active or self._flights.busy)

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
        with timeline.current.span("sending"):
            here = hidden.is_cpu
            host = hidden if here else hidden.cpu()
            device = None if here else hidden.device
            choice = self._choice
            if choice is None or choice[0] is not ids or choice[1] is not weights:
                choice = ids, weights, array(ids, torch.int64), array(weights, torch.float32)
                views = here and ids.dtype is torch.int64 and weights.dtype is torch.float32
                self._choice = choice if views else None  # copies would not change with them
            _, _, numbers, factors = choice
            self._step += 1
            self._routes.tick()
            sent = Sent(layer, host, numbers, factors, device, self._star.settle, self._step)
            if self._may_fly() and (flight := self._flights.ask(sent)):
                self.statistics.note(layer, numbers)  # while the nodes work
                return _Landing(self, self._flights, flight)
            answer = _Answer(self, self._submit(sent))
            _yield()  # nodes on this machine that were just asked go first: the layer waits for them
            return answer

    def take_back(self, total: torch.Tensor) -> None:
        """See models.base.take_back_of."""
        self._flights.take_back(total)

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
            self._star.ask_chain(sent, shares, owner)
        self._star.ask(sent, shares)
        self.tiers.sent()
        self.statistics.note(layer, numbers)  # while the nodes work
        return sent

    async def _collect(self, sent: Sent) -> torch.Tensor:
        parts, failed = await self._star.answers(sent)
        if failed:
            parts += await self._recovery.recover(sent, failed)
        else:
            self.chains.note(sent)
        return await self._added_up(sent, parts)

    async def _land(self, flight: Flight) -> torch.Tensor:
        """As `_collect`, of a flight."""
        sent = flight.sent
        if flight.view.here >= 0:
            _yield()  # see submit
            with timeline.current.span("local experts"):
                share = flight.shares()[flight.view.here]
                self._flights.put(flight, self._star.here(sent.layer, sent.hidden, share))
        with timeline.current.span("waiting"):
            total = self._flights.land(flight)
            if total is not None:
                await self._flights.give_turn()
                return total if sent.device is None else total.to(sent.device)
            await self._flights.wait(flight)
        if flight.plain:
            with timeline.current.span("adding up"):
                total, finite = self._flights.sum(flight)
            if finite:
                return total if sent.device is None else total.to(sent.device)
        parts, failed = self._flights.apart(flight)
        self._flights.release(flight)
        if failed:
            parts += await self._recovery.recover(sent, failed)
        return await self._added_up(sent, parts)

    async def _added_up(self, sent: Sent, parts: list[Rows]) -> torch.Tensor:
        with timeline.current.span("adding up"):
            total, finite = add_up(parts, sent.ids.shape, sent.hidden, self._reduction)
        if not finite:
            parts = await self._recovery.check(sent, parts)
            total, _ = add_up(parts, sent.ids.shape, sent.hidden, self._reduction)
        return total if sent.device is None else total.to(sent.device)

    def _failed(self, error: NodeUnavailable) -> None:
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
        if not elsewhere and now < part.due + watch.SILENT_SECONDS:
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
