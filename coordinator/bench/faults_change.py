"""The cluster changes while a text is being made: how long the slowest steps take, beside those of calm times.

A full replan moves every expert to the next node; a drain moves a node's experts to the others; a join lets in a node
whose disk is empty. Other plans of a real cluster copy less.
"""

import signal
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from time import perf_counter

from ..types import NodeName
from .faults_cluster import NODES, FaultCluster
from .faults_report import FaultRow

GOAL = 1.5  # times the calm 99th percentile
LEAVES = NODES[1]


async def measure_changes(made: FaultCluster, drain_and_join: bool, calm_steps: int, rounds: int) -> list[FaultRow]:
    """Rows for a replan, and for a drain and a join; a percentile is of the steps of all rounds together.

    `calm_steps` are read before and after each round. Raises CoordinatorError when a change does not end.
    """
    reader = made.reader

    steps: dict[str, list[float]] = defaultdict(list)

    async def note(name: str, change: Awaitable[None]) -> None:
        start = perf_counter()
        await change
        steps[name] += reader.between(start, perf_counter())

    for _ in range(rounds):
        await made.adopt(made.owners(0))
        async with reader.reading():
            await note("calm", reader.more(calm_steps))
            await note("full replan", made.adopt(made.owners(1)))
            if drain_and_join:
                former = made.pid(LEAVES)
                await note("drain", _drain(made, LEAVES))
                await _ended(made, LEAVES, former)
                made.forget_experts(LEAVES)
                # Its start takes the processor away from everybody here; elsewhere it would be on its own machine.
                await made.until(lambda: made.state(LEAVES) not in ("", "away", "leaving"), f"{LEAVES} does not join")
                await note("join", _joined(made, LEAVES))
            await note("calm", reader.more(calm_steps))
    usual = _slowest(steps.pop("calm"))
    return [
        FaultRow(
            what=f"99th percentile of a step during a {name} / calm",
            seconds=False, values=[_slowest(during) / usual], goals=[GOAL],
            note=f"{1e3 * _slowest(during):.1f} of {1e3 * usual:.1f} ms, {len(during)} steps",
        )
        for name, during in steps.items()
    ]  # fmt: skip


async def _drain(made: FaultCluster, node: NodeName) -> None:
    made.signal(node, signal.SIGTERM)
    await made.until(lambda: not _serves(made, node), f"{node} does not hand its experts over")


async def _ended(made: FaultCluster, node: NodeName, pid: int | None) -> None:
    await made.until(lambda: made.pid(node) != pid, f"{node} does not end")


async def _joined(made: FaultCluster, node: NodeName) -> None:
    await made.until(lambda: _serves(made, node), f"{node} does not get its share")


def _serves(made: FaultCluster, node: NodeName) -> bool:
    plan = made.coordinator.plan
    return plan is not None and node in plan.slices


def _slowest(seconds: Sequence[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
