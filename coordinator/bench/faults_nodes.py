"""One node fails while a text is being made: how long nobody gets a token, with replicas elsewhere and without."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from ..dispatch.watch import SILENT_SECONDS, TICK_SECONDS
from ..types import NodeName
from .faults_cluster import BEHIND_DOOR, CHANGE_SECONDS, NODES, FaultCluster
from .faults_reader import STEPS_AFTER
from .faults_report import FaultRow

WITH_REPLICAS_SECONDS = 1.0  # the goal; without replicas: the time to load what is missing, and BESIDES_SECONDS
BESIDES_SECONDS = 2.0
# The goal for a dead connection, on a layer's expected time; the deadline of a silent node is looked at now and then.
NOTICE_FACTOR, NOTICE_SECONDS = 3.0, 0.05


@dataclass(frozen=True, slots=True)
class NodeFault:
    """A fault: how it begins, at once, and how it ends."""

    name: str
    begin: Callable[[FaultCluster, NodeName], None]
    end: Callable[[FaultCluster, NodeName], Awaitable[None]]
    noticed_as: str = ""  # what the coordinator notices; empty: it is not looked at
    behind_door: bool = False
    met: Callable[[FaultCluster, NodeName], bool] = lambda made, node: True  # whether it has had its effect


async def _nothing(made: FaultCluster, node: NodeName) -> None:
    """A killed node is started again by the local cluster."""


async def _go_on(made: FaultCluster, node: NodeName) -> None:
    made.signal(node, signal.SIGCONT)


async def _open_door(made: FaultCluster, node: NodeName) -> None:
    made.door.set()


async def _mend(made: FaultCluster, node: NodeName) -> None:
    """The liar tells the truth again, and a person lets it in."""
    await made.until(lambda: made.state(node) == "quarantined", f"{node} lies and is not quarantined")
    made.lie(node, "")
    made.readmit(node)
    made.signal(node, signal.SIGKILL)  # so that it comes back at once
    await made.until(lambda: made.state(node) != "quarantined", f"{node} is let in and stays out")


KILLED = NodeFault(
    "killed (SIGKILL)", lambda made, node: made.signal(node, signal.SIGKILL), _nothing, "dead connection"
)
STOPPED = NodeFault("stopped (SIGSTOP)", lambda made, node: made.signal(node, signal.SIGSTOP), _go_on, "silent node")
CUT = NodeFault("cut off, both ways", lambda made, node: made.door.set("to", "from"), _open_door, behind_door=True)
CUT_FROM = NodeFault(
    "cut off, its answers only", lambda made, node: made.door.set("from"), _open_door, behind_door=True
)
LIES = NodeFault(  # which it does some 50 ms later: a short text may have ended by then
    "answers NaN",
    lambda made, node: made.lie(node, "nan"),
    _mend,
    met=lambda made, node: made.state(node) == "quarantined",
)


@dataclass(frozen=True, slots=True)
class _Found:
    """One fault, seconds; the bytes and the bytes a second of what was read in its place."""

    pause: float
    noticed: float
    layer: float  # a layer's share of a calm step before it
    nbytes: int
    bandwidth: float


async def measure_node_faults(
    made: FaultCluster, faults: Sequence[NodeFault], replicas: bool, times: int
) -> list[FaultRow]:
    """Rows of each fault, `times` each. Raises CoordinatorError when the cluster does not heal."""
    owners = made.owners(0, 1) if replicas else made.owners(0)
    words = "with replicas" if replicas else "without replicas"
    await made.adopt(owners)
    rows = []
    for fault in faults:
        found = []
        for number in range(times):
            node = BEHIND_DOOR if fault.behind_door else NODES[number % 2]
            found.append(await _once(made, fault, node))
            await fault.end(made, node)
            await made.whole(node, owners)
        rows += _rows(fault, found, words, replicas)
    return rows


async def _once(made: FaultCluster, fault: NodeFault, node: NodeName) -> _Found:
    coordinator, reader = made.coordinator, made.reader
    fallback = coordinator.fallback
    assert fallback is not None
    nbytes = made.only_there(node)
    read, seconds = fallback.bytes_read, fallback.seconds_read
    async with reader.reading():
        before = len(reader.steps)
        await reader.more(STEPS_AFTER)
        calm = median(step.seconds for step in reader.steps[before:] if step.decode)
        watching = asyncio.create_task(made.noticed(node))
        try:
            start = perf_counter()
            pause = await reader.pause(lambda: fault.begin(made, node), lambda: fault.met(made, node))
            noticed = 0.0
            if fault.noticed_as:
                noticed = await asyncio.wait_for(watching, CHANGE_SECONDS) - start
        finally:
            watching.cancel()
    read, seconds = fallback.bytes_read - read, fallback.seconds_read - seconds
    bandwidth = read / seconds if seconds else 0.0
    return _Found(pause, noticed, calm / len(coordinator.manifest.layers), nbytes, bandwidth)


def _rows(fault: NodeFault, found: Sequence[_Found], words: str, replicas: bool) -> list[FaultRow]:
    if replicas:
        goals, note = [WITH_REPLICAS_SECONDS] * len(found), ""
    else:
        goals = [BESIDES_SECONDS + (one.nbytes / one.bandwidth if one.bandwidth else 0.0) for one in found]
        nbytes, bandwidth = (median(getattr(one, name) for one in found) for name in ("nbytes", "bandwidth"))
        note = f"{nbytes / 1e6:.0f} MB to load, read at {bandwidth / 1e6:.0f} MB/s"
    rows = [
        FaultRow(
            what=f"node {fault.name}, {words}: longest wait for a token",
            values=[one.pause for one in found], goals=goals, note=note,
        )
    ]  # fmt: skip
    if fault.noticed_as:
        besides = 0.0 if fault is KILLED else TICK_SECONDS if replicas else TICK_SECONDS + SILENT_SECONDS
        rows.append(
            FaultRow(
                what=f"{fault.noticed_as} noticed, {words}",
                values=[one.noticed for one in found],
                goals=[NOTICE_FACTOR * one.layer + NOTICE_SECONDS + besides for one in found],
                note=f"a layer takes {1e3 * median(one.layer for one in found):.1f} ms",
            )
        )
    return rows
