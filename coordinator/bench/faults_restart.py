"""The coordinator is killed, then everything: how long after that the first token comes.

Here the coordinator is a process like its nodes, and each is started again as systemd would (process_cluster.py).
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import psutil

from moehive.client import Client

from .faults_reader import PROMPT
from .faults_report import FaultRow, FaultsReport
from .process_cluster import ProcessCluster, Supervised

NODES = 2
TOKENS = 24
WARM_SECONDS = 10.0  # the goal for a coordinator whose nodes are up
START_SECONDS = 120.0  # a start that takes longer has failed


async def measure_restarts(model: Path, folder: Path, report: FaultsReport, times: int) -> None:
    """Adds two rows: of the coordinator, and of everything. Raises CoordinatorError when nothing starts.

    `folder` exists and is empty.
    """
    cluster = ProcessCluster(model, folder, NODES)
    try:
        await cluster.start()
        _, expected = await asyncio.to_thread(_text, cluster.address)

        async def measure(what: str, parts: Sequence[Supervised], goals: Sequence[float] = ()) -> None:
            spent, busy = [], []
            for _ in range(times):
                start = perf_counter()
                await asyncio.gather(*(part.restart() for part in parts))
                await cluster.wait_answering(START_SECONDS)
                first, tokens = await asyncio.to_thread(_text, cluster.address)
                spent.append(first - start)
                busy.append(_processor_seconds(cluster.coordinator))
                report.texts += 1
                report.differ += tokens != expected
                await cluster.wait_ready(START_SECONDS)
            note = f"{median(busy):.1f} s of processor time in the coordinator"
            report.rows.append(FaultRow(what=f"{what}: first token", values=spent, goals=goals, note=note))

        await measure("coordinator killed and started again, nodes up", [cluster.coordinator], [WARM_SECONDS] * times)
        await measure(
            "everything killed and started again (power cut)", [cluster.coordinator, *cluster.nodes.values()]
        )
    finally:
        await cluster.stop()
        report.errors += cluster.crashes


def _processor_seconds(part: Supervised) -> float:
    """That its process has used."""
    assert part.process is not None
    used = psutil.Process(part.process.pid).cpu_times()
    return float(used.user + used.system)


def _text(address: str) -> tuple[float, list[int]]:
    """When (perf_counter) the first token of a text came, and all of them. Raises MoehiveError."""
    first = 0.0
    tokens: list[int] = []
    with Client(address) as client:
        for piece in client.stream(token_ids=PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True):
            if piece.token_ids and not tokens:
                first = perf_counter()
            tokens += piece.token_ids
    return first, tokens
