"""Keeps the dispatcher in step with the cluster: links to the nodes that are there, the local slice, the plan.

Membership decides (cluster/membership.py); this file only makes true what it decided. Links are opened when a node
arrives, before anything is dispatched to it, so that a switch of plans finds them ready.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import torch

from moehive.kernels.geometry import ExpertId
from moehive.proto.channel import Identity, node_dns_name
from moehive.proto.wire.channel import Channel

from .changes import Changes
from .cluster.membership import Membership
from .cluster.state import ClusterState
from .dispatch.dispatcher import Dispatcher
from .dispatch.link import Link
from .dispatch.local import LocalExperts
from .types import LOCAL, CoordinatorError, NodeName, NodeUnavailable, Plan

log = logging.getLogger(__name__)

# Before a node's link is opened again: at first, and at most for a node that is lost again and again.
REOPEN_SECONDS = (0.5, 15.0)
STEADY_SECONDS = 20.0  # a link that was open for so long is opened again as at first


class Follower:
    """Runs on the event loop's thread from `start` to `stop`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        local: LocalExperts | None,
        read: Callable[[ExpertId], torch.Tensor],
        identity: Callable[[], Identity],
    ) -> None:
        """`read` gives an expert's blob, for the local slice; `identity` is the coordinator's own."""
        self._dispatcher = dispatcher
        self._local = local
        self._read = read
        self._identity = identity
        self._membership: Membership | None = None
        self._opening: dict[NodeName, tuple[str, asyncio.Task[None]]] = {}  # by node: its address, the attempt
        self._loading: asyncio.Task[None] | None = None
        self._preparing: tuple[Plan, asyncio.Task[None]] | None = None
        self._holding: frozenset[NodeName] = frozenset()  # as the dispatcher was told
        self._rest: dict[NodeName, float] = {}  # seconds before the next attempt, of nodes whose links were lost
        self._changes = Changes()

    def follow(self, membership: Membership) -> None:
        """Names the membership whose `on_change` is `changed`."""
        self._membership = membership

    def changed(self, state: ClusterState) -> None:
        """A new state of the cluster."""
        for name, node in state.nodes.items():
            if name == LOCAL:
                continue
            address = node.capacity.address if node.present and node.capacity is not None else None
            self._keep_link(name, address)
        for name in [n for n in self._opening if n not in state.nodes]:
            self._keep_link(name, None)
        if self._local is not None:
            self._keep_local(state)
        if state.pending is not None and (self._preparing is None or self._preparing[0] is not state.pending):
            self._preparing = state.pending, asyncio.create_task(self._dispatcher.prepare(state.pending))
        if state.active is not None and state.active.epoch != self._dispatcher.epoch:
            self._dispatcher.follow(state.active, state.holders)
        elif state.holders != self._holding:
            self._dispatcher.holding(state.holders)
        self._holding = state.holders
        self._changes.tell()

    @property
    def reachable(self) -> bool:
        """Whether every expert of the plan in force has a node that is there, and those that are there are linked."""
        membership = self._membership
        return membership is not None and membership.state.ready and not self._unlinked(membership.state)

    def reason(self) -> str:
        """Why requests can't be served now, one sentence; empty when they can."""
        membership = self._membership
        if membership is None:
            return "The coordinator is starting."
        if (reason := membership.reason()) is not None:
            return reason
        unlinked = self._unlinked(membership.state)
        return f"The coordinator is connecting to {', '.join(unlinked)}." if unlinked else ""

    async def wait_reachable(self, timeout: float | None) -> None:  # noqa: ASYNC109 - its error says what is missing
        """Returns once every expert can be asked for.

        Raises CoordinatorError after `timeout` seconds (None: never) with what is missing.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self.reachable:
                    await self._changes.next()
        except TimeoutError:
            raise CoordinatorError(f"The cluster was not ready after {timeout:.0f} s. {self.reason()}") from None

    async def wait_linked(self, timeout: float) -> None:  # noqa: ASYNC109 - it is no error when it is over
        """Returns once each node that is here has a link, which has measured its round trip; at most `timeout` s."""
        membership = self._membership
        assert membership is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while any(
                    node.present and name != LOCAL and self._dispatcher.link(name) is None
                    for name, node in membership.state.nodes.items()
                ):
                    await self._changes.next()

    async def stop(self) -> None:
        """Closes every link."""
        tasks = [task for _, task in self._opening.values()]
        if self._preparing is not None:
            tasks.append(self._preparing[1])
        if self._loading is not None:
            tasks.append(self._loading)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _unlinked(self, state: ClusterState) -> list[NodeName]:
        return [name for name in sorted(state.holders) if name != LOCAL and self._dispatcher.link(name) is None]

    def _keep_link(self, name: NodeName, address: str | None) -> None:
        """Has one task keep the node's link open at `address`; None: no link."""
        present = self._opening.get(name)
        if present is not None and present[0] != address:
            present[1].cancel()
            del self._opening[name]
            present = None
        if present is None and address is not None:
            self._opening[name] = (address, asyncio.create_task(self._hold_link(name, address)))

    async def _hold_link(self, name: NodeName, address: str) -> None:
        """Opens the node's link again whenever it breaks, until cancelled."""
        said = ""
        first, longest = REOPEN_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._rest.get(name, 0.0))
            begun = loop.time()
            lost = asyncio.Event()
            channel = Channel(address, self._identity(), node_dns_name(name))
            link = Link(name, address, channel, on_close=lost.set)
            try:
                await link.open()
                said = ""
                self._dispatcher.connect(link)
                self._changes.tell()
                await lost.wait()
            except NodeUnavailable as error:
                if str(error) != said:
                    log.warning("%s", error)
                said = str(error)
            finally:
                self._dispatcher.disconnect(link)
                steady = loop.time() - begun > STEADY_SECONDS
                self._rest[name] = first if steady else min(longest, 2 * self._rest.get(name, first / 2))
                await link.close(f"Node {name} is away; the request can be sent again once it is back.")

    def _keep_local(self, state: ClusterState) -> None:
        """Loads the coordinator's own slice of a plan that waits for it."""
        node = state.nodes.get(LOCAL)
        if node is None or (self._loading is not None and not self._loading.done()):
            return
        for plan in (state.pending, state.active):
            if plan is not None and plan.epoch in node.assigned - node.ready:
                self._loading = asyncio.create_task(self._load_local(plan))
                return

    async def _load_local(self, plan: Plan) -> None:
        assert self._local is not None and self._membership is not None
        wanted = [ExpertId(layer, e) for layer, experts in enumerate(plan.slice_of(LOCAL)) for e in experts]
        try:
            await asyncio.to_thread(self._local.hold, wanted, self._read)
        except (CoordinatorError, MemoryError, OSError) as error:
            self._loading = None
            self._membership.local_failed(plan.epoch, f"The coordinator could not load its own experts: {error}")
            return
        self._loading = None
        self._membership.local_ready(plan.epoch)
        active = self._membership.state.active
        if active is not None and active.epoch == plan.epoch:
            self._local.drop_except(frozenset(wanted))
