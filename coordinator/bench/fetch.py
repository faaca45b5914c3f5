"""How fast experts come to the nodes, and from where: `moehive bench fetch` runs this.

What a load (fetch_cluster.py) is compared with is measured in the same run.
"""

import asyncio
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from moehive.kernels.machine import cores

from ..types import CoordinatorError
from .fetch_cluster import SPEC, FetchCluster, FetchModel, fetch_cluster
from .fetch_limits import disk_read_rate, forget_pages, tcp_copy, unavoidable_work
from .fetch_link import over_a_link

_READERS = 4  # of files at a time, which most disks need to be at their quickest


def measure_fetch(state_dir: Path, experts: int) -> list[dict[str, Any]]:
    """A row for each measurement, on a model of so many experts. Raises CoordinatorError, OSError."""
    import uvloop

    folder = Path(mkdtemp(prefix="fetch-", dir=_made(state_dir / "bench")))
    needed = 4 * experts * SPEC.nbytes
    try:
        if shutil.disk_usage(folder).free < needed:
            raise CoordinatorError(f"This measurement needs {needed / 1e9:.1f} GB of disk in {state_dir}; free some.")
        return uvloop.run(_measure(folder, experts))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _measure(folder: Path, experts: int) -> list[dict[str, Any]]:
    model = FetchModel(experts)
    link = await over_a_link(folder / "link", model)
    shutil.rmtree(folder / "link")
    async with fetch_cluster(folder / "one", model, 1, 1) as cluster:
        loopback, limit = await _first_load(cluster, model, folder)
        restart = await _restart(cluster, model, folder / "one")
    shutil.rmtree(folder / "one")
    async with fetch_cluster(folder / "three", model, 3, 2) as cluster:
        replicas = await _replicas(cluster, model)
    return [link, loopback, limit, replicas, restart]


async def _first_load(
    cluster: FetchCluster, model: FetchModel, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of one node over loopback, and what the machine could do at most: it copies before and after."""
    before = await asyncio.to_thread(tcp_copy)
    seconds = await cluster.load()
    after = await asyncio.to_thread(tcp_copy)
    copy = (before.bytes_per_s + after.bytes_per_s) / 2
    loopback = _row("loopback", model, seconds) | _rates(model, seconds, "tcp_copy_bytes_per_s", copy)
    loopback |= {**cluster.work_s_per_gb(), **cluster.peak()}
    work = {"tcp_copy_s_per_gb": (before.cpu_s_per_gb + after.cpu_s_per_gb) / 2}
    work |= await asyncio.to_thread(unavoidable_work, folder)
    total = sum(work.values()) + work["hash_s_per_gb"]  # the sender hashes what it reads, too
    most = min(cores() / total * 1e9, copy)
    limit = {"row": "limit", "cores": cores(), **work, "sum_s_per_gb": total, "bytes_per_s": most}
    return loopback, limit | {"ratio": most / copy}


async def _restart(cluster: FetchCluster, model: FetchModel, folder: Path) -> dict[str, Any]:
    """Of the node that was loaded, with nothing but its disk: beside reading the same files."""
    cluster.source.bytes_sent = 0
    await cluster.end_nodes()
    files = await asyncio.to_thread(lambda: sorted(folder.glob("node-1/cache/*/*.expert")))
    disk = max([await asyncio.to_thread(disk_read_rate, files, readers) for readers in (1, _READERS)])
    await asyncio.to_thread(forget_pages, files)
    seconds = await cluster.load()
    row = _row("restart", model, seconds) | _rates(model, seconds, "disk_read_bytes_per_s", disk)
    return row | {"coordinator_bytes_sent": cluster.source.bytes_sent, **cluster.peak()}


async def _replicas(cluster: FetchCluster, model: FetchModel) -> dict[str, Any]:
    """Of three nodes, each expert on two: what the coordinator sends, and what nodes have from each other."""
    seconds = await cluster.load()
    sent = cluster.source.bytes_sent
    row = {"row": "replicas", "nodes": 3, "replicas": 2, "bytes": model.nbytes, "seconds": seconds}
    return row | {"coordinator_bytes_sent": sent, "ratio": sent / model.nbytes}


def _row(name: str, model: FetchModel, seconds: float) -> dict[str, Any]:
    return {"row": name, "bytes": model.nbytes, "seconds": seconds}


def _rates(model: FetchModel, seconds: float, beside: str, rate: float) -> dict[str, float]:
    """A load's bytes a second, those of what it is compared with, and the first by the second."""
    ours = model.nbytes / seconds
    return {"bytes_per_s": ours, beside: rate, "ratio": ours / rate}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
