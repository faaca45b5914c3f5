"""The cluster of `moehive bench faults`: three nodes on this machine, the third behind a door that can be shut.

The coordinator runs in this process, so that what it knows (the plan, who is asked, what was read) can be looked at;
each node is a process of its own and is started again when it ends.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from moehive.kernels.geometry import ExpertId

from ..app import Coordinator
from ..cluster.records import readmit_node
from ..cluster.store import Store
from ..dispatch.parts import NodeCounters
from ..local_cluster import LocalCluster
from ..types import CoordinatorError, NodeName, Owners, Plan
from .chaos_door import Door
from .chaos_node import FILE, PRELUDE
from .faults_reader import Reader
from .faults_report import FaultsReport
from .ports import free_ports

NODES = tuple(NodeName(f"node-{n}") for n in range(1, 4))
BEHIND_DOOR = NODES[2]
CHANGE_SECONDS = 300.0  # for a plan to be loaded, or for a node to be back
LOOK_SECONDS = 0.05
WATCH_SECONDS = 0.001
ASKED = 8  # answers of a node after which it takes part again


@asynccontextmanager
async def fault_cluster(model: Path, folder: Path, report: FaultsReport) -> AsyncIterator["FaultCluster"]:
    """Starts the cluster in `folder`, reads the calm text, and ends it. Raises CoordinatorError or OSError."""
    ports = free_ports(len(NODES) + 1)
    door = Door(ports[-1], ports[-2])
    await door.open()
    doors = [(port, port) for port in ports[:-2]] + [(ports[-2], ports[-1])]
    cluster = LocalCluster(
        str(model), folder, len(NODES), grpc_port=0, http_port=0, threads=1, node_threads=1, doors=doors,
        prelude=PRELUDE,
    )  # fmt: skip
    try:
        await cluster.start()
        reader = Reader(cluster.coordinator, report)
        try:
            await reader.calm()
            yield FaultCluster(folder, cluster, door, reader)
        finally:
            await reader.stop()
    finally:
        await cluster.stop()
        await door.close()


class FaultCluster:
    """Made by `fault_cluster`."""

    def __init__(self, folder: Path, cluster: LocalCluster, door: Door, reader: Reader) -> None:
        self._folder = folder
        self._cluster = cluster
        self.door = door
        self.reader = reader

    @property
    def coordinator(self) -> Coordinator:
        """It runs in this process."""
        return self._cluster.coordinator

    def pid(self, node: NodeName) -> int | None:
        """Of a node's process, unless it has just ended."""
        return self._cluster.node_pids.get(node)

    def signal(self, node: NodeName, number: signal.Signals) -> None:
        """Sends a node's process a signal. Raises CoordinatorError when there is no process."""
        pid = self.pid(node)
        if pid is None:
            raise CoordinatorError(f"{node} does not run; run the command again.")
        os.kill(pid, number)

    def owners(self, *places: int) -> Owners:
        """A plan: expert e on the nodes that stand so many places after the e-th, counted round and round."""
        many = len(NODES)
        return tuple(
            tuple(tuple(NODES[(e + place) % many] for place in places) for e in range(layer.experts))
            for layer in self.coordinator.manifest.layers
        )

    async def adopt(self, owners: Owners) -> None:
        """Returns when the cluster serves by a plan with these owners."""
        coordinator = self.coordinator

        async def adopted() -> None:
            while coordinator.plan is None or coordinator.plan.owners != owners:
                await coordinator.improve(lambda capacities, epoch, current: Plan(epoch, owners))
                await asyncio.sleep(LOOK_SECONDS)

        await _in_time(adopted(), "The cluster does not take up a plan")

    def state(self, node: NodeName) -> str:
        """In one word, as `moehive status` has it; empty for one that is not known."""
        return next((found.state for found in self.coordinator.status().nodes if found.name == node), "")

    async def until(self, condition: Callable[[], bool], sentence: str) -> None:
        """Returns when `condition` holds. Raises CoordinatorError with the sentence after CHANGE_SECONDS."""

        async def looking() -> None:
            while not condition():  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(LOOK_SECONDS)

        await _in_time(looking(), sentence)

    async def whole(self, node: NodeName, owners: Owners) -> None:
        """Returns when all nodes are there, `owners` is the plan, and `node` answers again.

        What the coordinator has read in their place is forgotten, or the next fault would find it there.
        """
        coordinator = self.coordinator

        def there(name: NodeName) -> bool:
            return self.state(name) == "ready" and coordinator.dispatcher.link(name) is not None

        await self.until(lambda: all(map(there, NODES)), f"{node} does not come back")
        await self.adopt(owners)
        asked = self._counters(node).requests + ASKED
        async with self.reader.reading():
            await self.until(lambda: self._counters(node).requests >= asked, f"{node} is not asked again")
        if coordinator.fallback is not None:
            coordinator.fallback.clear()

    async def noticed(self, node: NodeName) -> float:
        """When (perf_counter) the coordinator finds that a node that served until now does not."""
        failed, link = self._counters(node).failed, self.coordinator.dispatcher.link
        while self._counters(node).failed == failed and link(node) is not None:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(WATCH_SECONDS)
        return perf_counter()

    def only_there(self, node: NodeName) -> int:
        """Bytes of the experts that nobody but `node` holds."""
        plan, manifest = self.coordinator.plan, self.coordinator.manifest
        assert plan is not None
        return sum(
            manifest.nbytes(ExpertId(number, expert))
            for number, layer in enumerate(plan.owners)
            for expert, nodes in enumerate(layer)
            if nodes == (node,)
        )

    def lie(self, node: NodeName, kind: str) -> None:
        """Has a node lie (chaos_node.py); an empty `kind`: tell the truth."""
        (self._folder / "nodes" / node / FILE).write_text(kind)

    def readmit(self, node: NodeName) -> None:
        """As `moehive node readmit` does it."""
        store = Store(self._folder / "coordinator.sqlite")
        try:
            readmit_node(store, node)
        finally:
            store.close()

    def forget_experts(self, node: NodeName) -> None:
        """Removes what a node that does not run has on its disk."""
        shutil.rmtree(self._folder / "nodes" / node / "cache", ignore_errors=True)

    def _counters(self, node: NodeName) -> NodeCounters:
        return self.coordinator.dispatcher.counters.get(node, NodeCounters())


async def _in_time(waiting: Coroutine[Any, Any, None], sentence: str) -> None:
    try:
        await asyncio.wait_for(waiting, CHANGE_SECONDS)
    except TimeoutError:
        raise CoordinatorError(f"{sentence} within {CHANGE_SECONDS:.0f} s; this is a bug in Moehive.") from None
