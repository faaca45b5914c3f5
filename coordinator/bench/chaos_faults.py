"""The faults of `moehive bench chaos`: each is caused, lasts and ends; what a person would have to mend is mended."""

import asyncio
import shutil
from contextlib import suppress

import psutil

from ..cluster.records import quarantined_nodes, readmit_node
from ..cluster.store import Store
from ..types import CoordinatorError, NodeName
from .chaos_node import FELT, FILE, LIES
from .process_cluster import ProcessCluster

CUTS = {"cut": ("to", "from"), "cut to": ("to",), "cut from": ("from",)}
NODE_KINDS = ("kill", "loop", "stop", *CUTS, "crawl", "disk full", "clock", *LIES)
COORDINATOR_KINDS = ("coordinator", "power cut")
KINDS = (*NODE_KINDS, *COORDINATOR_KINDS)
LOOPS = 3  # kills in a row
FELT_SECONDS = 40.0  # for a node that starts with a fault to come to where it has an effect
LOOK_SECONDS = 0.2  # in which a node has seen that its fault is over
ANSWER_SECONDS = 180.0  # for a coordinator that was killed to answer clients again
READY_SECONDS = 20.0  # for all nodes to be there then; with other faults about it may take longer
LEAK_BYTES = 256 << 20  # more memory than at first is a leak; torch and gRPC keep some
LEAK_FILES = 16


class Faults:
    """Use it on the cluster's event loop."""

    def __init__(self, cluster: ProcessCluster) -> None:
        self._cluster = cluster
        self.leaks = LeakWatch()

    async def cause(self, kind: str, node: str, seconds: float) -> None:
        """One of KINDS, on `node` (COORDINATOR_KINDS need none); returns when it is over and mended.

        `seconds`: how long it lasts if it does not end by itself. Raises CoordinatorError when a coordinator that
        was killed does not come back.
        """
        if kind in COORDINATOR_KINDS:
            await self._kill_coordinator(with_nodes=kind == "power cut")
        elif kind in ("kill", "loop"):
            for _ in range(1 if kind == "kill" else LOOPS):
                await self._cluster.nodes[node].restart()
        elif kind == "stop":
            await self._cluster.nodes[node].pause(seconds)
        elif kind == "crawl" or kind in CUTS:
            door = self._cluster.doors[node]
            door.set(*CUTS.get(kind, ()), crawls=kind == "crawl")
            await asyncio.sleep(seconds)
            door.set()
        elif kind == "clock":
            await self._set_clock(node, seconds)
        else:
            await self._ail(kind, node, seconds)

    async def readmit(self, node: str) -> None:
        """Lets a node in again if it is quarantined, as a person does who has mended it."""
        if await asyncio.to_thread(self._readmit, node):
            await self._cluster.nodes[node].restart()  # so that it comes back at once

    async def _kill_coordinator(self, with_nodes: bool) -> None:
        cluster = self._cluster
        self.leaks.look(cluster.coordinator.process)
        parts = [cluster.coordinator, *(cluster.nodes.values() if with_nodes else ())]
        await asyncio.gather(*(part.restart() for part in parts))
        await cluster.wait_answering(ANSWER_SECONDS)
        try:
            await cluster.wait_ready(READY_SECONDS)
        except CoordinatorError:
            return  # what is connected later would look like a leak: there is no first look at this process
        self.leaks.look(cluster.coordinator.process)

    async def _ail(self, kind: str, node: str, seconds: float) -> None:
        """A lie, which a person finds out about and mends in the end, or a full disk."""
        file = self._cluster.node_state(node) / FILE
        await asyncio.to_thread(file.write_text, kind)
        if kind == "disk full":  # of a node that has to fetch its slice anew
            await asyncio.to_thread(shutil.rmtree, file.with_name("cache"), ignore_errors=True)
            await self._restart_until_felt(node)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(file.unlink)
        await asyncio.sleep(LOOK_SECONDS)
        await self.readmit(node)

    async def _set_clock(self, node: str, seconds: float) -> None:
        """A node starts with a clock that is wrong: its certificate looks expired, and it ends, again and again."""
        process, file = self._cluster.nodes[node], self._cluster.node_state(node) / FILE
        process.may_end = True
        await asyncio.to_thread(file.write_text, "clock")
        await self._restart_until_felt(node)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(file.unlink)
        await process.restart()
        process.may_end = False

    async def _restart_until_felt(self, node: str) -> None:
        """Returns at the fault's first effect; without one too, when nobody gives the node anything to do."""
        felt = self._cluster.node_state(node) / FELT
        await asyncio.to_thread(felt.unlink, missing_ok=True)
        await self._cluster.nodes[node].restart()
        with suppress(TimeoutError):
            async with asyncio.timeout(FELT_SECONDS):
                while not await asyncio.to_thread(felt.exists):  # noqa: ASYNC110 - another process makes it
                    await asyncio.sleep(LOOK_SECONDS)

    def _readmit(self, node: str) -> bool:
        store = Store(self._cluster.state / "coordinator.sqlite")
        try:
            if NodeName(node) not in quarantined_nodes(store):
                return False
            readmit_node(store, node)
            return True
        finally:
            store.close()


class LeakWatch:
    """Compares a process's memory and file handles with what they were when it was first looked at."""

    def __init__(self) -> None:
        self._first: dict[psutil.Process, tuple[int, int]] = {}
        self.found: list[str] = []

    def look(self, process: asyncio.subprocess.Process | None) -> None:
        """At a process that has all that it needs, the first time; then whenever something may have leaked."""
        if process is None:
            return
        try:
            looked = psutil.Process(process.pid)
            memory, files = looked.memory_info().rss, looked.num_fds()
        except psutil.NoSuchProcess:
            return  # it has just crashed, which is reported
        first_memory, first_files = self._first.setdefault(looked, (memory, files))
        if memory - first_memory > LEAK_BYTES:
            self.found.append(f"memory of the coordinator grew by {(memory - first_memory) / 1e6:.0f} MB")
        if files - first_files > LEAK_FILES:
            self.found.append(f"the coordinator has {files - first_files} more file handles")


def children_left() -> list[str]:
    """The processes that this one has started and that are still there, in words."""
    return [f"process {child.pid} is left" for child in psutil.Process().children(recursive=True)]
