"""The cluster changes while a text is being made: how long the slowest steps take, beside those of calm times.

A full replan moves every expert to the next node; a drain moves a node's experts to the others; a join lets in a node
whose disk is empty. Other plans of a real cluster copy less.
"""

import signal
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter

from ..types import NodeName
from .faults_cluster import NODES, FaultCluster
from .faults_report import FaultRow

GOAL = 1.5  # times the calm 99th percentile
LEAVES = NODES[1]


async def measure_changes(made: FaultCluster, drain_and_join: bool, calm_steps: int) -> list[FaultRow]:
    """Rows for a replan, and for a drain and a join. Raises CoordinatorError when one of them does not end."""
    reader = made.reader

    async def calm() -> list[float]:
        start = perf_counter()
        await reader.more(calm_steps)
        return reader.between(start, perf_counter())

    async def during(change: Callable[[], Awaitable[None]]) -> list[float]:
        start = perf_counter()
        await change()
        return reader.between(start, perf_counter())

    await made.adopt(made.owners(0))
    meanwhile: dict[str, list[float]] = {}
    async with reader.reading():
        quiet = await calm()
        meanwhile["full replan"] = await during(lambda: made.adopt(made.owners(1)))
        if drain_and_join:
            pid = made.pid(LEAVES)
            meanwhile["drain"] = await during(lambda: _drain(made, LEAVES))
            await made.until(lambda: made.pid(LEAVES) != pid, f"{LEAVES} does not end")
            made.forget_experts(LEAVES)
            # Its start takes the processor away from everybody here; elsewhere it would be on its own machine.
            await made.until(lambda: made.state(LEAVES) not in ("", "away", "leaving"), f"{LEAVES} does not join")
            meanwhile["join"] = await during(lambda: _joined(made, LEAVES))
        quiet += await calm()
    usual = _slowest(quiet)
    return [
        FaultRow(
            what=f"99th percentile of a step during a {name} / calm",
            seconds=False, values=[_slowest(steps) / usual], goals=[GOAL],
            note=f"{1e3 * _slowest(steps):.1f} of {1e3 * usual:.1f} ms, {len(steps)} steps",
        )
        for name, steps in meanwhile.items()
    ]  # fmt: skip


async def _drain(made: FaultCluster, node: NodeName) -> None:
    made.signal(node, signal.SIGTERM)
    await made.until(lambda: not _serves(made, node), f"{node} does not hand its experts over")


async def _joined(made: FaultCluster, node: NodeName) -> None:
    await made.until(lambda: _serves(made, node), f"{node} does not get its share")


def _serves(made: FaultCluster, node: NodeName) -> bool:
    plan = made.coordinator.plan
    return plan is not None and node in plan.slices


def _slowest(seconds: Sequence[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
