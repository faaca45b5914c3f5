"""Whole clusters: a coordinator in this process, expert nodes as real processes, everything over real sockets."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
from by_path import load
from node_here import node_here as running_node

from moehive.client import Client
from moehive.coordinator.app import Coordinator
from moehive.coordinator.cluster.store import Store
from moehive.coordinator.cluster.tokens import create_token
from moehive.coordinator.cluster.trust import Authority
from moehive.coordinator.settings import CoordinatorSettings
from moehive.expert_node.node import Node

DEADLINE = 120.0  # seconds; only a broken cluster takes so long

T = TypeVar("T")


class NodeProcess:
    """One `python -m moehive.expert_node`."""

    def __init__(self, name: str, state: Path, token: str | None, room: list[str]) -> None:
        arguments = ["--name", name, "--listen", "127.0.0.1:0", "--state-dir", str(state)]
        arguments += [*room, "--threads", "1"]
        if token is not None:
            arguments += ["--token", token]
        self.log_path = state.with_suffix(".log")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moehive.expert_node", *arguments], stdout=log, stderr=log
            )

    @property
    def log(self) -> str:
        """What the process has said so far."""
        return self.log_path.read_text(errors="replace")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal, waits for the end and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


class TestCluster:
    """One cluster's state directory: its CA, its node processes, and a coordinator that may be started again."""

    __test__ = False

    def __init__(self, folder: Path, speed: bytes, memory: str = "1GiB") -> None:
        """`speed`: what each node knows of its machine; `memory` that each gives to experts."""
        self.state = folder / "coordinator"
        self.state.mkdir(parents=True)
        self.authority = Authority.create(self.state / "ca")
        self.folder = folder
        self._speed = speed
        self.nodes: dict[str, NodeProcess] = {}
        self.room = ["--memory", memory]  # of nodes that are started from now on
        self._ports = (0, 0)

    @asynccontextmanager
    async def coordinator(self, model: Path, nodes: int, **changes: Any) -> AsyncIterator[Coordinator]:
        """A coordinator of `model` on the same ports as the last one of this cluster; node processes as needed.

        Nodes from before come back by themselves; those beyond `nodes` are ended.
        """
        for name in [name for name in self.nodes if int(name.removeprefix("node-")) >= nodes]:
            self.nodes.pop(name).end(signal.SIGKILL)
        async with self.coordinator_alone(model, nodes, **changes) as coordinator:
            for number in range(nodes):
                self.start_node(f"node-{number}")
            await coordinator.wait_ready(DEADLINE)
            yield coordinator

    @asynccontextmanager
    async def coordinator_alone(self, model: Path, min_nodes: int, **changes: Any) -> AsyncIterator[Coordinator]:
        """Starts no nodes, and waits for none."""
        values: dict[str, Any] = {
            "model": str(model), "state_dir": self.state, "grpc_port": 0, "http_port": 0, "min_nodes": min_nodes,
            "cluster_port": self._ports[0], "join_port": self._ports[1], "kv_bytes": 256 << 20, "threads": 1,
        }  # fmt: skip
        coordinator = Coordinator(CoordinatorSettings(**(values | changes)))
        await coordinator.start()
        try:
            self._ports = (coordinator.cluster_port, coordinator.join_port)
            yield coordinator
        finally:
            await coordinator.stop()

    def node_here(self, name: str) -> AbstractAsyncContextManager[Node]:
        """See node_here.py."""
        return running_node(self.folder / name, self._speed, self.token(), name)

    def start_node(self, name: str) -> NodeProcess:
        """Starts the node's process unless it runs; it joins with a token the first time."""
        running = self.nodes.get(name)
        if running is not None and running.process.poll() is None:
            return running
        state = self.folder / name
        token = None
        if not state.exists():
            token = self.token()
            state.mkdir(mode=0o700)
            (state / "speed.json").write_bytes(self._speed)
        self.nodes[name] = NodeProcess(name, state, token, self.room)
        return self.nodes[name]

    def token(self) -> str:
        """A join token for the coordinator's present ports."""
        store = Store(self.state / "coordinator.sqlite")
        try:
            return str(create_token(store, f"127.0.0.1:{self._ports[1]}", self.authority.fingerprint))
        finally:
            store.close()

    def close(self) -> None:
        """Ends every node process."""
        for node in self.nodes.values():
            node.end(signal.SIGKILL)


def ask(coordinator: Coordinator, call: Callable[[Client], T]) -> Coroutine[Any, Any, T]:
    """Runs `call` with a client of `coordinator` on a thread: the loop is the coordinator's."""

    def run() -> T:
        with Client(f"127.0.0.1:{coordinator.grpc_port}") as client:
            return call(client)

    return asyncio.to_thread(run)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, speed: bytes) -> Iterator[TestCluster]:
    """A cluster that a module's tests share, so that node processes start once."""
    torch.set_num_threads(1)
    made = TestCluster(tmp_path_factory.mktemp("cluster"), speed)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def new_cluster(tmp_path: Path, speed: bytes) -> Iterator[Callable[[], TestCluster]]:
    """Makes clusters of a test's own."""
    made: list[TestCluster] = []

    def make(memory: str = "1GiB") -> TestCluster:
        made.append(TestCluster(tmp_path / f"cluster-{len(made)}", speed, memory))
        return made[-1]

    try:
        yield make
    finally:
        for cluster in made:
            cluster.close()


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """tests/coordinator/families.py: `FAMILIES`, `make_checkpoint(family, folder)`."""
    return load(Path(__file__).parents[1] / "coordinator" / "families.py")


@pytest.fixture(scope="session", name="ask")
def ask_fixture() -> Callable[..., Any]:
    """See `ask`."""
    return ask


@pytest.fixture(scope="session")
def checkpoint(families: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's random checkpoint, made once."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "models" / family
        if not folder.exists():
            families.make_checkpoint(family, folder)
        return folder

    return make


os.environ.setdefault("OMP_NUM_THREADS", "1")
