"""What a person sees while nodes load their slices: bytes, rate and time left of each."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ..sizes import in_bytes

if TYPE_CHECKING:
    from moehive.client.results import NodeStatus as NodeSeen

    from ..local_cluster import LocalCluster
    from ..serving.status import NodeStatus

POLL_SECONDS = 0.5


def wait_started(started: "Future[None]", cluster: "LocalCluster") -> None:
    """Waits for `started`, the cluster's start on another thread, and raises what it raises."""
    from rich.console import Console

    from .progress import byte_bars

    console = Console(stderr=True)
    if not console.is_terminal:
        started.result()
        return
    with byte_bars(transient=True) as progress:
        tasks = {}
        while True:
            try:
                started.result(POLL_SECONDS)
                return
            except TimeoutError:
                if started.done():  # it is the start itself that has timed out
                    raise
            for node in _loading(cluster):
                if node.name not in tasks:
                    tasks[node.name] = progress.add_task(node.name, total=node.load_total_bytes)
                progress.update(tasks[node.name], completed=node.load_bytes, total=node.load_total_bytes)


def _loading(cluster: "LocalCluster") -> "list[NodeStatus]":
    """The nodes that load a slice now; the state that is read is replaced, never changed, so any thread may."""
    coordinator = getattr(cluster, "coordinator", None)
    if coordinator is None or not coordinator.cluster_open.is_set():
        return []
    return [node for node in coordinator.status().nodes if node.load_total_bytes]


def load_sentences(nodes: "Sequence[NodeSeen]") -> Iterator[str]:
    """One for each node that loads a slice, and for each that gave wrong bytes to another."""
    for node in nodes:
        if node.load_total_bytes:  # also of a node that serves what it has meanwhile
            text = f"{node.name} has loaded {in_bytes(node.load_bytes)} of {in_bytes(node.load_total_bytes)}"
            if node.load_bytes_per_s > 0:
                left = (node.load_total_bytes - node.load_bytes) / node.load_bytes_per_s
                text += f", {node.load_bytes_per_s / 1e6:,.0f} MB/s, {left:,.0f} s left"
            yield text + "."
        if node.source_fault:
            yield f"{node.name} {node.source_fault}; they were fetched again from elsewhere."
