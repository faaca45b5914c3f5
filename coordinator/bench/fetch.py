"""How fast experts come to the nodes, and from where: `moehive bench fetch` runs this.

The real cluster server with made-up experts in this process, and node processes as everywhere: joined with tokens,
over mutual TLS, with their caches on disk. A load's time is from the assignment to the report that all is held, so
hashing and writing are in it. What it is compared with is measured in the same run.
"""

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter, process_time
from typing import Any

import psutil
import torch

from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.machine import cores

from ..checkpoints.slices import SliceSource
from ..cluster.membership import Membership
from ..cluster.server import ClusterServer
from ..cluster.state import ClusterState
from ..cluster.store import Store
from ..cluster.tokens import create_token
from ..cluster.trust import Authority
from ..types import CoordinatorError, NodeName, Plan
from .decode import peak_bytes
from .fetch_limits import disk_read_rate, forget_pages, tcp_copy, unavoidable_work
from .ports import free_ports
from .slow_link import Cable, LinkSpeed, SlowLinks

GIGABIT = LinkSpeed(0.00025, 1e9)
SPEC = ExpertSpec(hidden_size=2048, intermediate_size=768, activation="silu", format="bf16")  # Qwen3-30B's, 9.4 MB
_BUFFER_BYTES = 64 << 20
_READERS = 4
_DEADLINE = 600.0  # seconds for any one load
_RSS_SHARE, _RSS_BASE = 1.05, 200 * 10**6  # what a node's peak may be: its slice, and Python with its libraries


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
    model = _Model(experts)
    async with _cluster(folder / "link", model, 1, 1, GIGABIT) as cluster:
        seconds = await cluster.load()
        share = model.nbytes * 8 / seconds / GIGABIT.bits_per_s
        link = {"row": "link", "link": str(GIGABIT), "bytes": model.nbytes, "seconds": seconds, "share": share}
    shutil.rmtree(folder / "link")

    before = await asyncio.to_thread(tcp_copy)
    async with _cluster(folder / "one", model, 1, 1, None) as cluster:
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

    async with _cluster(folder / "three", model, 3, 2, None) as cluster:
        seconds = await cluster.load()
        sent = cluster.source.bytes_sent
        replicas = {"row": "replicas", "nodes": 3, "replicas": 2, "bytes": model.nbytes, "seconds": seconds}
        replicas |= {"coordinator_bytes_sent": sent, "ratio": sent / model.nbytes}
    return [link, loopback, limit, replicas, restart]


class _Model:
    """Experts of random bits, each another."""

    def __init__(self, experts: int) -> None:
        self.manifest = Manifest("bench", "0" * 64, (LayerGeometry(experts, 1, SPEC),))
        self.nbytes = self.manifest.total_bytes
        self._bits = torch.randint(0, 256, (_BUFFER_BYTES,), dtype=torch.uint8)

    def blob(self, expert: ExpertId) -> torch.Tensor:
        """uint8 [SPEC.nbytes]."""
        start = (expert.expert * 4099) % (_BUFFER_BYTES - SPEC.nbytes)
        return self._bits[start : start + SPEC.nbytes]


class _Cluster:
    """A cluster server and its node processes."""

    def __init__(
        self, folder: Path, store: Store, authority: Authority, model: _Model, nodes: int, replicas: int
    ) -> None:
        self.source = SliceSource(model.manifest, model.blob)
        self.pids: list[int] = []
        self._replicas = replicas
        self._folder = folder
        self._store = store
        self.authority = authority
        self._model = model
        self._nodes = nodes
        self._processes: list[asyncio.subprocess.Process] = []
        self._assigned_at = 0.0
        self._work = 0.0, 0.0  # seconds of a processor that the last load took of this process, and of the first node
        self._ready_at = asyncio.Future[float]()
        membership = Membership(store, model.manifest, nodes, 0, self._changed, self._place)
        self.membership = membership

    async def serve(self, host: str, advertise: str, ports: tuple[int, int]) -> ClusterServer:
        server = ClusterServer(
            self.authority, self._store, self.membership, self.source,
            host=host, advertise=advertise, join_port=ports[0], cluster_port=ports[1],
        )  # fmt: skip
        await server.start()
        self._join_address = server.join_address
        return server

    async def load(self) -> float:
        """Starts the nodes; the seconds from the first assignment to the last report."""
        self._assigned_at, self._ready_at = 0.0, asyncio.Future()
        for number in range(1, self._nodes + 1):
            state = self._folder / f"node-{number}"
            token = str(create_token(self._store, self._join_address, self.authority.fingerprint))
            with (self._folder / f"node-{number}.log").open("ab") as output:
                self._processes.append(
                    await asyncio.create_subprocess_exec(
                        sys.executable, "-m", "moehive.expert_node", "--token", token, "--name", f"node-{number}",
                        "--listen", "127.0.0.1:0", "--state-dir", str(state),
                        "--memory", str(self._model.nbytes + (64 << 20)), "--threads", "1",
                        stderr=output,
                    )
                )  # fmt: skip
        ended = [asyncio.ensure_future(process.wait()) for process in self._processes]
        try:
            waits: set[asyncio.Future[Any]] = {self._ready_at, *ended}
            done, _ = await asyncio.wait(waits, timeout=_DEADLINE, return_when=asyncio.FIRST_COMPLETED)
            if self._ready_at not in done:
                logs = [path.read_text()[-400:] for path in sorted(self._folder.glob("*.log"))]
                raise CoordinatorError("A node of the measurement ended or did not get ready: " + " ".join(logs))
        finally:
            for wait in ended:
                wait.cancel()
        return self._ready_at.result() - self._assigned_at

    def work_s_per_gb(self) -> dict[str, float]:
        """Seconds of a processor that the last load took, for 1 GB."""
        here, there = (seconds / self._model.nbytes * 1e9 for seconds in self._work)
        return {"coordinator_cpu_s_per_gb": here, "node_cpu_s_per_gb": there}

    def peak(self) -> dict[str, int]:
        """The first node's largest resident size, and the bound for its slice."""
        limit = int(_RSS_SHARE * self._model.nbytes) + _RSS_BASE
        return {"node_peak_bytes": peak_bytes(self._processes[0].pid), "node_peak_limit_bytes": limit}

    async def end_nodes(self) -> None:
        """Ends them at once, as a power cut would."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._processes.clear()

    def _changed(self, state: ClusterState) -> None:
        now = perf_counter()
        if not self._assigned_at and any(node.assigned for node in state.nodes.values()):
            self._assigned_at, self._work = now, self._spent()
        if self._assigned_at and state.ready and not self._ready_at.done():
            (here, there), (here_before, there_before) = self._spent(), self._work
            self._work = here - here_before, there - there_before
            self._ready_at.set_result(now)

    def _spent(self) -> tuple[float, float]:
        node = psutil.Process(self._processes[0].pid).cpu_times()
        return process_time(), node.user + node.system

    def _place(
        self,
        capacities: Mapping[NodeName, int],
        layers: Sequence[LayerGeometry],
        epoch: int,
        previous: Plan | None = None,
    ) -> Plan:
        """Each expert on `replicas` nodes, in turn."""
        names = sorted(capacities)
        turn = [tuple(names[(at + k) % len(names)] for k in range(self._replicas)) for at in range(len(names))]
        return Plan(epoch, tuple(tuple(turn[e % len(names)] for e in range(layer.experts)) for layer in layers))


@asynccontextmanager
async def _cluster(
    folder: Path, model: _Model, nodes: int, replicas: int, link: LinkSpeed | None
) -> AsyncIterator[_Cluster]:
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(folder.mkdir)
        store = Store(folder / "coordinator.sqlite")
        stack.callback(store.close)
        cluster = _Cluster(folder, store, Authority.create(folder / "ca"), model, nodes, replicas)
        ports, advertise = (0, 0), "127.0.0.1"
        if link is not None:  # the nodes know another address of loopback, behind which the link is
            ports, advertise = (free_ports(1)[0], free_ports(1)[0]), "127.0.0.2"
            cables = [Cable("coordinator", "nodes", port, (advertise, port)) for port in ports]
            stack.enter_context(SlowLinks(cables, link))
        server = await cluster.serve("127.0.0.1", advertise, ports)
        stack.push_async_callback(server.stop)
        stack.push_async_callback(cluster.end_nodes)
        yield cluster


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
