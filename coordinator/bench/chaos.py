"""`moehive bench chaos`: a cluster of four nodes on this machine, four clients, and faults drawn from a seed.

Coordinator and nodes are processes that are started again when they end. Every answer is compared with that of a calm
run (the cluster is deterministic), token by token. The verdict counts answers that differ, requests that failed,
processes that ended by themselves, the longest time without a token, and what was left behind.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moehive.client import MoehiveError

from ..types import CoordinatorError
from .chaos_clients import Clients
from .chaos_faults import COORDINATOR_KINDS, KINDS, Faults, children_left
from .chaos_model import tiny_model
from .chaos_node import PRELUDE
from .chaos_report import ChaosReport
from .process_cluster import ProcessCluster

NODES = 4
CALM_SECONDS = (0.3, 1.5)  # between two faults
FAULT_SECONDS = (0.3, 6.0)  # how long a fault lasts that ends by itself
HEAL_SECONDS = 120.0  # for the cluster to be whole again at the end
AT_ONCE = 2  # faults, on different machines


def run_chaos(seed: int, minutes: float, told: Callable[[str], None] = lambda line: None) -> ChaosReport:
    """Runs it all; `told` gets a line for each fault. Raises CoordinatorError when the cluster does not start."""
    with tempfile.TemporaryDirectory(prefix="moehive-chaos-") as folder:
        return asyncio.run(_run(Path(folder), ChaosReport(seed, minutes), told))


async def _run(folder: Path, report: ChaosReport, told: Callable[[str], None]) -> ChaosReport:
    cluster = ProcessCluster(tiny_model(folder / "model"), folder, NODES, prelude=PRELUDE)
    clients = Clients(cluster.address, report.seed, report, lambda: cluster.coordinator.kills)
    faults = Faults(cluster)
    try:
        await cluster.start()
        try:
            await asyncio.to_thread(clients.learn)
        except MoehiveError as error:
            raise CoordinatorError(f"The calm cluster does not answer: {error}") from error
        faults.leaks.look(cluster.coordinator.process)
        clients.start()
        await _storm(faults, list(cluster.nodes), report, told)
        await asyncio.to_thread(clients.stop)
        for node in cluster.nodes:
            await faults.readmit(node)
        try:
            await cluster.wait_ready(HEAL_SECONDS)
        except CoordinatorError as error:
            report.failed_with("the cluster after the storm", str(error))
        await asyncio.to_thread(clients.check)
        faults.leaks.look(cluster.coordinator.process)
    finally:
        await cluster.stop()
    report.crashes = cluster.crashes
    report.leaks = faults.leaks.found + children_left()
    return report


async def _storm(faults: Faults, nodes: list[str], report: ChaosReport, told: Callable[[str], None]) -> None:
    """Causes faults for as long as the report says; returns when the last one is over."""
    choice = random.Random(report.seed)
    running: dict[asyncio.Task[None], str] = {}  # and where
    kinds: list[str] = []
    end = time.monotonic() + 60 * report.minutes
    while time.monotonic() < end:
        await asyncio.sleep(choice.uniform(*CALM_SECONDS))
        kinds = kinds or choice.sample(KINDS, len(KINDS))  # each once, in an order of the seed's
        on_coordinator = kinds[-1] in COORDINATOR_KINDS
        free = [name for name in (["coordinator"] if on_coordinator else nodes) if name not in running.values()]
        if len(running) == AT_ONCE or not free:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del running[task]
                task.result()
            continue
        kind, where, seconds = kinds.pop(), choice.choice(free), choice.uniform(*FAULT_SECONDS)
        report.faults += 1
        report.by_kind[kind] += 1
        report.latest = kind
        told(f"{kind} on {where}, {seconds:.1f} s" if where in nodes else kind)
        running[asyncio.create_task(_cause(faults, kind, where, seconds, report))] = where
    await asyncio.gather(*running)


async def _cause(faults: Faults, kind: str, where: str, seconds: float, report: ChaosReport) -> None:
    if kind in COORDINATOR_KINDS:
        report.outage = kind
    try:
        await faults.cause(kind, where, seconds)
    except CoordinatorError as error:
        report.failed_with(kind, str(error))
    finally:
        if kind in COORDINATOR_KINDS:
            report.outage = ""
