"""`moehive bench faults`: one fault at a time on a calm cluster of this machine, and what each costs a reader.

Every text that is read meanwhile is compared with the calm one, token by token (the cluster is deterministic). The
model has random weights in the shapes of a known one, so that experts have bytes to read.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .faults_change import measure_changes
from .faults_cluster import fault_cluster
from .faults_nodes import CUT, CUT_FROM, KILLED, LIES, STOPPED, NodeFault, measure_node_faults
from .faults_report import FaultsReport
from .faults_restart import measure_restarts
from .faults_throttle import measure_throttled
from .random_file import random_file
from .random_model import RandomModel

GEOMETRY, FORMAT, EXPERTS = "qwen3-30b", "q4_0", 32
ALL = (KILLED, STOPPED, CUT, CUT_FROM, LIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """How much is measured."""

    layers: int
    without_replicas: tuple[NodeFault, ...]
    with_replicas: tuple[NodeFault, ...]
    times: int  # each of them
    drain_and_join: bool
    calm_steps: int  # before changes of the cluster, and after
    rounds: int  # with a throttled node
    restarts: int  # of the coordinator, and of everything


WHOLE = _Size(
    layers=4, without_replicas=ALL, with_replicas=ALL, times=3, drain_and_join=True, calm_steps=400, rounds=4,
    restarts=3,
)  # fmt: skip
QUICK = _Size(
    layers=1, without_replicas=(CUT_FROM,), with_replicas=(KILLED,), times=1, drain_and_join=False, calm_steps=100,
    rounds=1, restarts=0,
)  # fmt: skip


def measure_faults(quick: bool, told: Callable[[str], None] = lambda line: None) -> FaultsReport:
    """Measures everything, or with `quick` a part, on a smaller model. `told` hears what comes next.

    Raises CoordinatorError when a cluster does not start or does not heal, OSError.
    """
    import uvloop

    logging.getLogger("moehive").setLevel(logging.CRITICAL)  # what goes wrong here is meant to
    size = QUICK if quick else WHOLE
    report = FaultsReport()
    with tempfile.TemporaryDirectory(prefix="moehive-faults-") as name:
        folder = Path(name)
        told("writing a model")
        wanted = RandomModel(geometry=GEOMETRY, format=FORMAT, layers=size.layers, experts=EXPERTS)
        model = random_file(wanted, folder / "models")
        (folder / "cluster").mkdir()
        uvloop.run(_on_one_cluster(model, folder / "cluster", report, size, told))
        if size.restarts:
            told("restarts of processes")
            (folder / "processes").mkdir()
            uvloop.run(measure_restarts(model, folder / "processes", report, size.restarts))
    return report


async def _on_one_cluster(
    model: Path, folder: Path, report: FaultsReport, size: _Size, told: Callable[[str], None]
) -> None:
    told("starting a cluster")
    async with fault_cluster(model, folder, report) as made:
        told("changes of the cluster")
        report.rows += await measure_changes(made, size.drain_and_join, size.calm_steps, size.times)
        told("faults of nodes without replicas")
        report.rows += await measure_node_faults(made, size.without_replicas, False, size.times)
        told("faults of nodes with replicas")
        report.rows += await measure_node_faults(made, size.with_replicas, True, size.times)
        told("a throttled node")
        report.rows += await measure_throttled(made, size.rounds)
