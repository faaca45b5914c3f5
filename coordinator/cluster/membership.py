"""Who is in the cluster, and what follows from it: decides plans, directs the nodes, notices silence.

All of it runs on the event loop's thread, but making a plan (planner.py) and writing it down (plans.py).
Everything that happens becomes an event (events.py), which changes the state (transitions.py); after each, this file
looks at the new state and does what is due: plan, assign, commit, release (when, says policy.py). So there is one
place where things are decided, and no order of arrivals that needs a thought of its own.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from moehive.kernels.geometry import Manifest
from moehive.proto.timing import SILENCE_SECONDS

from ..changes import Changes
from ..types import LOCAL, CoordinatorError, NodeName
from . import policy
from .drains import accept_drain, drains, refuse_drain
from .events import (
    Event,
    HeartbeatReceived,
    NodeArrived,
    NodeAway,
    NodeDrained,
    NodeLeaving,
    NodeQuarantined,
    NodeReadmitted,
    Planned,
    Resumed,
    SliceAssigned,
    SliceHeld,
    SliceNotHeld,
    SliceProgressed,
)
from .planner import Planner
from .plans import ModelTooLarge, Plans
from .records import quarantine_node, quarantined_nodes, revoked_nodes
from .session import Assign, Commit, Released, Session
from .state import Capacity, ClusterState
from .store import Store
from .transitions import apply

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # how often silence and overdue decisions are looked for
RETRY_SECONDS = 10.0  # a slice that could not be loaded is assigned again after this
SETTLE_SECONDS = 2.0  # from a switch of plans to the Commit: requests sent by the old plan are answered meanwhile


class Membership:
    """Owns the cluster's state, and the planner that changes it when somebody comes, goes or has a better plan.

    `on_change` gets each new state; it must be quick and may call `local_ready`.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        min_nodes: int,
        local_bytes: int,
        on_change: Callable[[ClusterState], None],
        place: policy.Place,
    ) -> None:
        """`local_bytes` of the coordinator's own memory hold experts too; 0: none. `place` is called on threads."""
        self.manifest = manifest
        self.state = ClusterState()
        self._store = store
        self._min_nodes = min_nodes
        self._local_bytes = local_bytes
        self._on_change = on_change
        self._plans = Plans(store, manifest, place)
        self.planner = Planner(self._plans, manifest.layers, min_nodes, lambda: self.state, self._record)
        self._sessions: dict[NodeName, Session] = {}
        self._events: deque[Event | None] = deque()  # to be applied; None: only time has passed
        self._recording = False
        self._changes = Changes()
        self._away_since: dict[NodeName, float] = {}
        self._retry_at: dict[NodeName, float] = {}
        self._settled_at = 0.0  # when Commits and Releases of the last switch are due
        self._draining: asyncio.Task[None] | None = None  # looks whether a node may be drained
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes up the plan that was in force before, if any, and starts the clock. Raises CoordinatorError."""
        stored = self._plans.last()
        if stored is not None and self._local_bytes < self._plans.slice_bytes(stored[0], LOCAL):
            stored = None  # the coordinator gives less memory than it did
        if stored is not None:
            plan, members = stored
            log.info("Taking up the plan of epoch %d: waiting for %s.", plan.epoch, ", ".join(sorted(members)))
            self._record(Resumed(plan, members))
        for name, sentence in quarantined_nodes(self._store).items():
            self._record(NodeQuarantined(name, sentence))
        for name, drain in drains(self._store).items():
            if drain.accepted:
                self._record(NodeDrained(name))
        if self._local_bytes > 0:
            self._record(NodeArrived(LOCAL, Capacity("", self._local_bytes)))
        self._ticker = asyncio.create_task(self._tick_forever())

    async def stop(self) -> None:
        """Releases the nodes that are leaving and ends all sessions."""
        for task in (self._ticker, self._draining):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self.planner.stop()
        await self._plans.kept()
        for name, session in list(self._sessions.items()):
            if self.state.nodes[name].leaving and not session.released:
                session.send(Released())
            session.end()

    # What the nodes do

    def arrive(self, name: NodeName, capacity: Capacity) -> Session:
        """A node has opened a control stream; an older one of the same node is ended."""
        former = self._sessions.pop(name, None)
        if former is not None:
            log.warning("Node %s has opened a second control stream; the first is ended.", name)
            former.end(f"Node {name} has opened another control stream, which replaces this one.")
            self._record(NodeAway(name))
        session = Session(name, asyncio.get_running_loop().time())
        self._sessions[name] = session
        self._retry_at.pop(name, None)
        log.info("Node %s is here: %s, %.1f GB for experts.", name, capacity.address, capacity.ram_bytes / 1e9)
        self._record(NodeArrived(name, capacity))
        return session

    def report(self, session: Session, event: Event) -> None:
        """Something that a node said on its stream; ignored when another stream has replaced this one."""
        if self._sessions.get(session.name) is not session:
            return
        session.last_seen = asyncio.get_running_loop().time()
        if isinstance(event, SliceNotHeld):
            log.warning("Node %s could not load its slice: %s", event.name, event.sentence)
            self._retry_at[event.name] = session.last_seen + RETRY_SECONDS
        self._record(event)

    def depart(self, session: Session) -> None:
        """A node's control stream has ended."""
        if self._sessions.get(session.name) is session:
            del self._sessions[session.name]
            log.info("Node %s is away.", session.name)
            self._record(NodeAway(session.name))

    def quarantine(self, name: NodeName, sentence: str) -> None:
        """A node has answered what can't be true: it is shut out, over restarts too, until it is readmitted."""
        node = self.state.nodes.get(name)
        if name == LOCAL or node is None or node.quarantine:
            return
        log.error("Node %s is quarantined: %s", name, sentence)
        try:
            quarantine_node(self._store, name, sentence)
        except CoordinatorError as error:
            log.error("The quarantine holds until the next start only: %s", error)
        self._shut_out(name, f"{sentence} This node is quarantined until `moehive node readmit {name}`.")
        self._record(NodeQuarantined(name, sentence))

    # What the coordinator's own memory does

    def local_ready(self, epoch: int) -> None:
        """The coordinator holds its own slice of the plan of `epoch`."""
        self._record(SliceHeld(LOCAL, epoch))

    def local_failed(self, epoch: int, sentence: str) -> None:
        """The coordinator could not load its own slice; it is assigned again later."""
        self._retry_at[LOCAL] = asyncio.get_running_loop().time() + RETRY_SECONDS
        self._record(SliceNotHeld(LOCAL, epoch, sentence))

    # What others ask

    async def wait_ready(self, timeout: float | None) -> None:  # noqa: ASYNC109 - its error says what is missing
        """Returns once every expert has a node that is there.

        Raises CoordinatorError after `timeout` seconds (None: never) with a sentence that says what is missing.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self.state.ready:
                    await self._changes.next()
        except TimeoutError as error:
            raise CoordinatorError(f"The cluster was not ready after {timeout:.0f} s. {self.reason()}") from error

    async def release(self, name: NodeName) -> None:
        """Moves a node's experts to the others, lets it stop, and returns once they serve.

        Raises CoordinatorError when the others have no room; nothing has changed then.
        """
        if name == LOCAL or name not in self.state.nodes:
            raise CoordinatorError(f"There is no node named {name[:64]!r} in the cluster.")
        await self.planner.find_room(name)
        self._record(NodeLeaving(name))
        while policy.is_needed(self.state, name):
            await self._changes.next()

    def reason(self) -> str | None:
        """Why the cluster is not ready, in one sentence; None when it is."""
        return policy.reason(self.state, self._min_nodes, self.planner.shortage)

    # Inside

    def _record(self, event: Event | None) -> None:
        """Applies an event (None: time has passed), and those that follow from it, one after the other."""
        self._events.append(event)
        if self._recording:
            return
        self._recording = True
        try:
            while self._events:
                before, cause = self.state, self._events.popleft()
                if cause is None:
                    self._decide()
                    continue
                self.state = apply(before, cause)
                if self.state is not before:
                    self._follow(before, cause)
        finally:
            self._recording = False

    def _follow(self, before: ClusterState, cause: Event) -> None:
        state, now = self.state, asyncio.get_running_loop().time()
        for name, node in state.nodes.items():
            if node.present:
                self._away_since.pop(name, None)
            else:
                self._away_since.setdefault(name, now)
        if state.active is not None and state.active is not before.active:
            log.info("The plan of epoch %d is in force: %s.", state.active.epoch, _share_words(state))
            self._settled_at = now if before.active is None else now + SETTLE_SECONDS
            if not isinstance(cause, Resumed):
                self._plans.keep(state.active, state.members)
        if isinstance(cause, Planned | Resumed):
            self.planner.measure(cause.plan, state.pending_owners | state.active_owners)
        self._on_change(state)
        self._changes.tell()
        if not isinstance(cause, HeartbeatReceived | SliceProgressed):
            self._decide()

    def _decide(self) -> None:
        """Does what the present state asks for; doing it again changes nothing."""
        if self._events:
            return  # they come first; this is called again after them
        self.planner.replan(self._away_since)
        if not self._events:
            self._direct()

    def _direct(self) -> None:
        """Sends each node what it has not been told yet."""
        state, now = self.state, asyncio.get_running_loop().time()
        plans = [(plan, owners) for plan, owners in
                 ((state.active, state.active_owners), (state.pending, state.pending_owners)) if plan]  # fmt: skip
        for name, node in state.nodes.items():
            session = self._sessions.get(name)
            if not node.present or (session is None and name != LOCAL):
                continue
            for plan, owners in plans:
                latest = plan.epoch == state.epoch  # of it, who has no experts is told so, and drops what it had
                part = name in owners or (latest and (name in state.members or node.drained))
                if part and plan.epoch not in node.assigned and now >= self._retry_at.get(name, now):
                    if session is not None:
                        session.send(Assign(plan.epoch, plan.slice_of(name), plan.pins.get(name)))
                    self._record(SliceAssigned(name, plan.epoch))
            if session is None or now < self._settled_at:
                continue
            if node.leaving and not session.released and not self.planner.busy and policy.may_go(state, name):
                log.info("Node %s is released.", name)
                session.released = True
                session.send(Released())
            active = state.active
            if active is None or active.epoch not in node.ready or session.committed == active.epoch:
                continue
            # Not while the node loads a newer slice: a Commit lets it drop all but the active one.
            if max(node.assigned) == active.epoch:
                session.committed = active.epoch
                session.send(Commit(active.epoch))

    def _shut_out(self, name: NodeName, sentence: str) -> None:
        session = self._sessions.get(name)
        if session is not None:
            session.end(sentence)
            self.depart(session)

    def _obey_store(self) -> None:
        """Does what other processes (`moehive node …`) have written into the store."""
        shut_out, asked = quarantined_nodes(self._store), drains(self._store)
        for name, node in list(self.state.nodes.items()):
            if (node.quarantine and name not in shut_out) or (node.drained and name not in asked):
                log.info("Node %s is let in again.", name)
                self._record(NodeReadmitted(name))
        for name in revoked_nodes(self._store) & self._sessions.keys():
            self._shut_out(name, f"Node {name} was shut out of this cluster; let it join again with a new token.")

        waiting = [name for name, drain in asked.items() if not drain.accepted and not drain.refusal]
        if waiting and self.state.active is not None and (self._draining is None or self._draining.done()):
            self._draining = asyncio.create_task(self._drain(waiting[0]))

    async def _drain(self, name: NodeName) -> None:
        """Accepts a request of `moehive node drain` if the others have room, else says why not."""
        try:
            try:
                await self.planner.find_room(name)
            except ModelTooLarge as error:
                refuse_drain(self._store, name, f"Node {name} keeps its experts, for the others can't: {error}")
                return
            accept_drain(self._store, name)
        except CoordinatorError as error:
            log.warning("Node %s can't be drained yet: %s", name, error)
            return
        log.info("Node %s is drained: the others load its experts.", name)
        self._record(NodeDrained(name))

    async def _tick_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            # When the loop itself was held up, reports lie unread: that is not the nodes' silence.
            late = loop.time() - due
            for session in list(self._sessions.values()):
                if late > TICK_SECONDS:
                    session.last_seen += late
                if loop.time() - session.last_seen > SILENCE_SECONDS:
                    session.end(f"Node {session.name} sent no report for {SILENCE_SECONDS:.0f} s.")
                    self.depart(session)
            try:
                self._obey_store()
                self._record(None)
            except Exception:  # whatever went wrong in one second, silence must be noticed in the next
                log.exception("The cluster's state could not be looked after")


def _share_words(state: ClusterState) -> str:
    assert state.active is not None
    counts = {name: sum(map(len, state.active.slice_of(name))) for name in sorted(state.active_owners)}
    return ", ".join(f"{name} {count} experts" for name, count in counts.items())
