"""The cluster of `moehive bench fetch`: the real cluster server in this process, made-up experts, node processes.

Nodes join with tokens, over mutual TLS, with their caches on disk. A load's time is from the assignment to the report
that all is held, so hashing and writing are in it.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import psutil
import torch

from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest

from ..checkpoints.slices import SliceSource
from ..cluster.membership import Membership
from ..cluster.server import ClusterServer
from ..cluster.state import ClusterState
from ..cluster.store import Store
from ..cluster.tokens import create_token
from ..cluster.trust import Authority
from ..types import CoordinatorError, NodeName, Plan
from .process_memory import node_peak_limit_bytes, peak_bytes

SPEC = ExpertSpec(hidden_size=2048, intermediate_size=768, activation="silu", format="bf16")  # Qwen3-30B's, 9.4 MB
_BUFFER_BYTES = 64 << 20
_DEADLINE = 600.0  # seconds for any one load


@dataclass(frozen=True, slots=True)
class Route:
    """How nodes reach the coordinator: where it listens, what they are told, and what starts them elsewhere."""

    host: str = "127.0.0.1"
    advertise: str = "127.0.0.1"
    ports: tuple[int, int] = (0, 0)  # for joining, for the cluster; 0: any
    prefix: tuple[str, ...] = ()  # words before a node's command


LOOPBACK = Route()


class FetchModel:
    """Experts of random bits, each another."""

    def __init__(self, experts: int) -> None:
        self.manifest = Manifest("bench", "0" * 64, (LayerGeometry(experts, 1, SPEC),))
        self.experts = experts
        self.nbytes = self.manifest.total_bytes
        self._bits = torch.randint(0, 256, (_BUFFER_BYTES,), dtype=torch.uint8)

    def blob(self, expert: ExpertId) -> torch.Tensor:
        """uint8 [SPEC.nbytes]."""
        start = (expert.expert * 4099) % (_BUFFER_BYTES - SPEC.nbytes)
        return self._bits[start : start + SPEC.nbytes]


class FetchCluster:
    """A cluster server and its node processes."""

    def __init__(
        self, folder: Path, store: Store, authority: Authority, model: FetchModel, nodes: int, replicas: int,
        route: Route,
    ) -> None:  # fmt: skip
        self.source = SliceSource(model.manifest, model.blob)
        self._replicas = replicas
        self._route = route
        self._folder = folder
        self._store = store
        self._authority = authority
        self._model = model
        self._nodes = nodes
        self._processes: list[asyncio.subprocess.Process] = []
        self._join_address = ""  # known once the server is started
        self._assigned_at = 0.0
        self._work = 0.0, 0.0  # seconds of a processor that the last load took of this process, and of the first node
        self._ready_at = asyncio.Future[float]()
        self._membership = Membership(store, model.manifest, nodes, 0, self._changed, self._place)

    async def serve(self) -> ClusterServer:
        """Starts the cluster server; whoever calls stops it."""
        route = self._route
        server = ClusterServer(
            self._authority, self._store, self._membership, self.source,
            host=route.host, advertise=route.advertise, join_port=route.ports[0], cluster_port=route.ports[1],
        )  # fmt: skip
        await server.start()
        self._join_address = server.join_address
        return server

    async def load(self) -> float:
        """Starts the nodes; the seconds from the first assignment to the last report."""
        self._assigned_at, self._ready_at = 0.0, asyncio.Future()
        for number in range(1, self._nodes + 1):
            self._processes.append(await self._start_node(f"node-{number}"))
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

    async def _start_node(self, name: str) -> asyncio.subprocess.Process:
        token = str(create_token(self._store, self._join_address, self._authority.fingerprint))
        with (self._folder / f"{name}.log").open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *self._route.prefix, sys.executable, "-m", "moehive.expert_node",
                "--token", token, "--name", name, "--listen", "127.0.0.1:0", "--threads", "1",
                "--state-dir", str(self._folder / name), "--memory", str(self._model.nbytes + (64 << 20)),
                stderr=output,
            )  # fmt: skip

    def work_s_per_gb(self) -> dict[str, float]:
        """Seconds of a processor that the last load took, for 1 GB."""
        here, there = (seconds / self._model.nbytes * 1e9 for seconds in self._work)
        return {"coordinator_cpu_s_per_gb": here, "node_cpu_s_per_gb": there}

    def peak(self) -> dict[str, int]:
        """The first node's largest resident size, and the bound for its slice."""
        peak, limit = peak_bytes(self._processes[0].pid), node_peak_limit_bytes(self._model.nbytes)
        return {"node_peak_bytes": peak, "node_peak_limit_bytes": limit}

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
async def fetch_cluster(
    folder: Path, model: FetchModel, nodes: int, replicas: int, route: Route = LOOPBACK
) -> AsyncIterator[FetchCluster]:
    """Serves until the context ends; its nodes are started by `load`. `folder` is made."""
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(folder.mkdir)
        store = Store(folder / "coordinator.sqlite")
        stack.callback(store.close)
        cluster = FetchCluster(folder, store, Authority.create(folder / "ca"), model, nodes, replicas, route)
        server = await cluster.serve()
        stack.push_async_callback(server.stop)
        stack.push_async_callback(cluster.end_nodes)
        yield cluster
