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
from .fetch_cluster import SPEC, FetchModel, fetch_cluster
from .fetch_limits import disk_read_rate, forget_pages, tcp_copy, unavoidable_work
from .fetch_link import over_a_link

_READERS = 4


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

    before = await asyncio.to_thread(tcp_copy)
    async with fetch_cluster(folder / "one", model, 1, 1) as cluster:
        seconds = await cluster.load()
        after = await asyncio.to_thread(tcp_copy)
        copy = (before.bytes_per_s + after.bytes_per_s) / 2
        rate = model.nbytes / seconds
        loopback = {"row": "loopback", "bytes": model.nbytes, "seconds": seconds, "bytes_per_s": rate}
        loopback |= {"tcp_copy_bytes_per_s": copy, "ratio": rate / copy}
        loopback |= {**cluster.work_s_per_gb(), **cluster.peak()}
        work = {"tcp_copy_s_per_gb": (before.cpu_s_per_gb + after.cpu_s_per_gb) / 2}
        work |= await asyncio.to_thread(unavoidable_work, folder)
        total = sum(work.values()) + work["hash_s_per_gb"]  # the sender hashes what it reads, too
        limit = {"row": "limit", "cores": cores(), **work, "sum_s_per_gb": total}
        most = min(cores() / total * 1e9, copy)
        limit |= {"bytes_per_s": most, "ratio": most / copy}

        cluster.source.bytes_sent = 0
        await cluster.end_nodes()
        files = await asyncio.to_thread(lambda: sorted(folder.glob("one/node-1/cache/*/*.expert")))
        disk = max([await asyncio.to_thread(disk_read_rate, files, readers) for readers in (1, _READERS)])
        await asyncio.to_thread(forget_pages, files)
        seconds = await cluster.load()
        rate = model.nbytes / seconds
        restart = {"row": "restart", "bytes": model.nbytes, "seconds": seconds, "bytes_per_s": rate}
        restart |= {"disk_read_bytes_per_s": disk, "ratio": rate / disk}
        restart |= {"coordinator_bytes_sent": cluster.source.bytes_sent, **cluster.peak()}
    shutil.rmtree(folder / "one")

    async with fetch_cluster(folder / "three", model, 3, 2) as cluster:
        seconds = await cluster.load()
        sent = cluster.source.bytes_sent
        replicas = {"row": "replicas", "nodes": 3, "replicas": 2, "bytes": model.nbytes, "seconds": seconds}
        replicas |= {"coordinator_bytes_sent": sent, "ratio": sent / model.nbytes}
    return [link, loopback, limit, replicas, restart]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
