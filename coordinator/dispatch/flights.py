"""Layers of few tokens: asked, answered and added up in native code (cpp/flights.h).

There is one such layer for each step of decoding, and what Python does about it takes longer than a message on a home
network. Whatever is not as usual (8 bits on a slow link, hints for a node's disk, an answer that refuses) is left to
dispatcher.py, which takes a flight apart into what it would have of a larger layer.
"""

import asyncio
import ctypes
import weakref
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch

from moehive.kernels.geometry import Manifest
from moehive.kernels.ops import Reduction
from moehive.proto.lookout import Lookout
from moehive.proto.tensors import Reply, rows_tensor
from moehive.proto.wire.messages import Buffer
from moehive.proto.wire.windows import HEAD_BYTES, Times

from .. import timeline
from ..types import LOCAL, NodeName, NodeUnavailable
from . import watch
from .flight import ASKED, TAKEN, Flight, Memory, View, Way
from .link import ID_STEP, Link, Peer
from .native import address, library
from .parts import WIRE_REDUCTION, Part, Sent
from .replies import Replies
from .routes import Routes
from .routing import Share
from .rows import Rows
from .sums import Sums
from .watch import Watch

NOT_FINITE, FINITE, LATER, ODD = range(4)  # what came of waiting natively: Landed of cpp/flights.h
OWED_BYTES = 256 << 10  # that were read natively: then they are credited
TURN_SECONDS = 5e-3  # of layers that nobody waited for on the event loop: then it has a turn


class Flights:
    """All of a dispatcher's; use it on the event loop's thread."""

    def __init__(
        self,
        manifest: Manifest,
        reduction: Reduction,
        routes: Routes,
        replies: Replies,
        watching: Watch,
        on_failed: Callable[[NodeUnavailable], None],
    ) -> None:
        """`on_failed` hears of each share that failed."""
        self._manifest = manifest
        self._reduction = reduction
        self._routes = routes
        self._replies = replies
        self._watch = watching
        self._on_failed = on_failed
        self._lookout = Lookout()  # for the last answer to a flight
        self._awaited = 0  # flights that are waited for on the event loop
        self._turn_at = 0.0  # seconds: when the loop had a turn for certain
        self._landed_at = 0.0  # seconds: the latest flight that nobody awaited
        self._native = library()
        self._ask, self._reply = self._native.moehive_flight_ask, self._native.moehive_flight_reply
        self._land = self._native.moehive_flight_land
        self.handle: int = self._native.moehive_flights()
        if not self.handle:
            raise MemoryError("There is no memory left to dispatch layers.")
        weakref.finalize(self, self._native.moehive_flights_end, self.handle)
        self._views: list[View] = []
        self._flights: list[Flight | None] = []
        self._ways: list[Way | None] = [None] * len(manifest.layers)
        self._peers: ctypes.Array[ctypes.c_void_p] | None = None  # of the nodes of the plan in force
        self._links: list[Link | None] = []  # to those
        self._local = Peer()
        self._memory: Memory | None = None  # of the latest layer
        self._sums = Sums()

    def routes_changed(self) -> None:
        """Somebody can be asked again or no more, or a plan came into force."""
        self._ways = [None] * len(self._ways)
        self._peers = None

    def ask(self, sent: Sent) -> Flight | None:
        """Asks for a layer; None when it is not one for here. Raises NotReady before the first plan."""
        memory = self._memory
        if memory is None or not memory.is_of(sent):
            memory = Memory(sent.hidden, sent.ids, sent.weights)
            self._memory = None if memory.places is None else memory  # a long prompt's is not kept
        way = self._ways[sent.layer] or self._way(sent.layer)
        if memory.places is None or memory.k != way.k or memory.width != way.hidden_size:
            return None
        number = self._ask(
            self.handle,
            ctypes.addressof(way),
            sent.step,
            *memory.places,
            memory.tokens,
            memory.bf16,
            self._routes.speeds.layers,
        )
        if number < 0:
            return None
        if number == len(self._views):
            self._views.append(View.from_address(self._native.moehive_flight_view(self.handle, number)))
            self._flights.append(None)
        view = self._views[number]
        flight = self._flights[number] = Flight(number, view, way.experts, sent, memory.kind, self._links)
        if view.unsent:
            for share, link in enumerate(flight.links):
                if link is not None and view.sent[share] != view.size[share] + HEAD_BYTES:
                    link.send_flight(view.message[share], view.size[share], view.sent[share])
        return flight

    def land(self, flight: Flight) -> torch.Tensor | None:
        """A flight's sum, and the flight is released; None when its answers are to be awaited on the event loop.

        It waits for some milliseconds where nothing else is expected, and ends when the loop has something to do.
        """
        if self._awaited or not flight.plain:
            return None
        total = self._sums.room(flight.kind, flight.sent.hidden)
        start = flight.since = perf_counter()
        landed = self._land(self.handle, flight.number, *self._lookout.patience(), total.data_ptr())
        if landed == FINITE:
            self._landed_at = perf_counter()
            self._lookout.learn(self._landed_at - start)
            if timeline.current.on:
                self._record(flight)
            if flight.view.owed > OWED_BYTES:
                for link in flight.links:
                    if link is not None:
                        link.settle()
            self.release(flight)
            return total
        self._sums.take_back(total)
        if landed < 0:
            raise MemoryError("There is no memory left to add up a layer.")
        if landed == ODD:
            for link in flight.links:
                if link is not None:
                    link.go_on()
        return None

    def wait(self, flight: Flight) -> "asyncio.Future[None]":
        """Is done once no share is waited for."""
        loop, view = asyncio.get_running_loop(), flight.view
        done = flight.done = loop.create_future()
        self._awaited += 1
        if timeline.current.on:
            for share in range(view.shares):
                if view.state[share] == ASKED:
                    flight.replies[share] = loop.create_future()
            self._record(flight)
        patience = watch.FIRST_SECONDS if view.unknown else 3 * view.expected_s + watch.SLACK_SECONDS
        flight.due = loop.time() + patience
        self._watch.add(flight)
        self._lookout.expect(flight.since)
        self._settled(flight)
        return done

    @property
    def busy(self) -> bool:
        """Whether a layer has landed within the last TICK_SECONDS."""
        return perf_counter() - self._landed_at < watch.TICK_SECONDS

    async def give_turn(self) -> None:
        """Gives the event loop a turn if it had none for TURN_SECONDS."""
        if self._landed_at - self._turn_at > TURN_SECONDS:
            self._turn_at = self._landed_at
            await asyncio.sleep(0)

    def take(self, link: Link, message: Buffer, times: Times) -> bool:
        """Takes a node's reply that came at `times`; False when it answers no flight, or not as usual."""
        where: Any = message if type(message) is bytes else np.frombuffer(message, np.uint8).ctypes.data
        times.came_at = 0  # as if it had been read natively
        if self._reply(self.handle, link.peer_at, where, len(message), ctypes.addressof(times)) < 0:
            return False
        self.arrived()
        return True

    def arrived(self) -> None:
        """Replies were taken, here or as they were read."""
        for flight in self._flights:
            if flight is None or flight.done is None or flight.done.done():
                continue
            for share, reply in flight.replies.items():
                if flight.view.state[share] == TAKEN and not reply.done():
                    reply.set_result(flight.trip(share))
            self._settled(flight)

    def take_strange(self, link: Link, reply: Reply) -> bool:
        """Takes a reply that `take` did not; False when it answers no flight."""
        found = self._native.moehive_flight_find(self.handle, link.peer_at, reply.head.id)
        if found < 0:
            return False
        flight, share = self._flight(found), found & 127
        asked = flight.shares()[share]
        part = Part(flight.sent.layer, ((link.node, asked),), asked, flight.done, 0.0, flight.due)  # type: ignore[arg-type]
        try:
            flight.strange[share] = self._replies.read(part, flight.sent.hidden, reply)
        except NodeUnavailable as error:
            flight.errors[share] = error
        self._settle(flight, share)
        return True

    def lost(self, link: Link, error: NodeUnavailable) -> None:
        """Nothing will come of a link any more."""
        while (found := self._native.moehive_flight_any(self.handle, link.peer_at)) >= 0:
            flight = self._flight(found)
            flight.errors[found & 127] = error
            self._settle(flight, found & 127)

    def late(self, flight: Flight) -> None:
        """A flight's time is over: gives up who has not answered, at once where others have the experts too."""
        now = asyncio.get_running_loop().time()
        shares = flight.shares()
        for number in range(flight.view.shares):
            if flight.view.state[number] != ASKED:
                continue
            node, experts = flight.node(number), shares[number].routing.experts
            elsewhere = self._routes.placed.held_without(flight.sent.layer, experts, (node,))
            if elsewhere or now >= flight.due + watch.SILENT_SECONDS:
                flight.errors[number] = NodeUnavailable(node, f"Node {node} is late; others are asked.")
                self._settle(flight, number)

    def put(self, flight: Flight, rows: torch.Tensor) -> None:
        """Takes the rows that this process has computed of its own share, in the hidden states' type."""
        rows = rows.contiguous()
        self._native.moehive_flight_put(self.handle, flight.number, flight.view.here, rows.data_ptr())
        self._settled(flight)

    def sum(self, flight: Flight) -> tuple[torch.Tensor, bool]:
        """All rows of a plain flight, added up as rows.py's `add_up` does, and whether all are numbers."""
        total = self._sums.room(flight.kind, flight.sent.hidden)
        finite = self._native.moehive_flight_sum(self.handle, flight.number, total.data_ptr())
        if finite < 0:
            raise MemoryError("There is no memory left to add up a layer.")
        return total, bool(finite)

    def take_back(self, total: torch.Tensor) -> None:
        """See Sums."""
        self._sums.take_back(total)

    def apart(self, flight: Flight) -> tuple[list[Rows], list[Share]]:
        """What was answered and what failed, of a flight that is over, as a larger layer has it."""
        size, dtype = flight.sent.hidden.shape[1], flight.sent.hidden.dtype
        parts, failed = [], []
        for number, share in enumerate(flight.shares()):
            if number in flight.strange:
                parts.append(flight.strange[number])
            elif flight.view.state[number] == TAKEN:
                rows = len(share.pairs) if self._reduction is Reduction.PER_EXPERT else len(share.tokens)
                where = self._native.moehive_flight_rows(self.handle, flight.number, number)
                raw = ctypes.string_at(where, rows * size * dtype.itemsize)
                link = flight.links[number]
                if link is None:
                    parts.append(Rows(share, None, rows_tensor(raw, dtype, rows, size)))
                else:
                    parts.append(Rows.of_bytes(share, link.node, raw, rows, size, dtype))
            else:
                failed.append(share)
        return parts, failed

    def release(self, flight: Flight) -> None:
        """A flight is over, whatever is still on its way. Does nothing the second time."""
        if self._flights[flight.number] is not flight:
            return
        self._flights[flight.number] = None
        self._native.moehive_flight_release(self.handle, flight.number)
        if flight.done is not None:
            self._awaited -= 1
            self._watch.remove(flight)
            if not flight.done.done() or flight.done.cancelled():  # as who awaits it is
                self._lookout.came()
            for reply in flight.replies.values():
                reply.cancel()

    def _flight(self, found: int) -> Flight:
        flight = self._flights[found >> 7]
        assert flight is not None
        return flight

    def _settle(self, flight: Flight, share: int) -> None:
        """A share is over without an answer that native code has taken."""
        self._native.moehive_flight_settle(self.handle, flight.number, share)
        if share in flight.errors:
            self._on_failed(flight.errors[share])
        self._settled(flight)

    def _settled(self, flight: Flight) -> None:
        """A share is over."""
        if flight.view.waiting == 0 and flight.done is not None and not flight.done.done():
            flight.done.set_result(None)
            self._lookout.came()

    def _record(self, flight: Flight) -> None:
        """Tells the timeline of a flight's round trips: of those that are over, and of those that `replies` has."""
        for share, link in enumerate(flight.links):
            if link is None:
                continue
            reply = flight.replies.get(share)
            if reply is None:
                if flight.view.state[share] != TAKEN:
                    continue
                reply = asyncio.get_running_loop().create_future()
                reply.set_result(flight.trip(share))
            timeline.current.hop(link.node, flight.sent.layer, reply, lambda trip: trip)

    def _way(self, layer: int) -> Way:
        """How a layer is asked for as of now. Raises NotReady before the first plan."""
        placed = self._routes.placed
        if self._peers is None:
            self._peers = self._find_peers(placed.names)
        links = self._links
        geometry, has_choice = self._manifest.layers[layer], placed.has_choice[layer]
        holders = placed.holders(layer).array if has_choice else None
        first = placed.owners[layer]
        way = self._ways[layer] = Way(
            holders=None if holders is None else address(holders),
            first=address(first),
            peers=ctypes.addressof(self._peers),
            experts=len(first),
            most=0 if holders is None else holders.shape[1],
            nodes=len(links),
            local=placed.names.index(LOCAL) if LOCAL in placed.names else -1,
            k=geometry.top_k,
            hidden_size=geometry.spec.hidden_size,
            expert_bytes=geometry.expert_bytes,
            epoch=placed.plan.epoch,
            id_step=ID_STEP,
            layer=layer,
            reduction=WIRE_REDUCTION[self._reduction],
            has_choice=has_choice,
        )
        way.kept = holders, first, self._peers, links
        return way

    def _find_peers(self, names: Sequence[NodeName]) -> "ctypes.Array[ctypes.c_void_p]":
        """Who of `names` can be asked, by the address of its Peer."""
        self._links = [self._routes.asking.links.get(name) for name in names]
        peers = (ctypes.c_void_p * max(1, len(names)))()
        for number, (name, link) in enumerate(zip(names, self._links, strict=True)):
            if name == LOCAL:
                peer = self._local
            elif link is not None:
                peer = link.peer
                peer.link = ctypes.addressof(link.speed)
            else:
                continue
            peer.speed = ctypes.addressof(self._routes.speeds.of(name))
            peer.counters = ctypes.addressof(self._replies.counters_of(name))
            peers[number] = ctypes.addressof(peer)
        return peers
