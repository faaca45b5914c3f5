"""What a person sees while the nodes of a local cluster load their slices: bytes, rate and time left of each."""

from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..local_cluster import LocalCluster

POLL_SECONDS = 0.5


def wait_started(started: "Future[None]", cluster: "LocalCluster") -> None:
    """Waits for `started`, the cluster's start on another thread, and raises what it raises."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        started.result()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        tasks = {}
        while True:
            try:
                started.result(POLL_SECONDS)
                return
            except TimeoutError:
                if started.done():  # it is the start itself that has timed out
                    raise
            for node in cluster.loading():
                if node.name not in tasks:
                    tasks[node.name] = progress.add_task(node.name)
                progress.update(tasks[node.name], completed=node.load_bytes, total=node.load_total_bytes)
