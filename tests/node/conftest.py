"""A small random model, the real coordinator's cluster server on loopback, and real node processes."""

import asyncio
import hashlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from grpc_channel import open_channel
from node_here import node_here as running_node

from moehive.coordinator.checkpoints.slices import SliceSource
from moehive.coordinator.cluster import membership as membership_module
from moehive.coordinator.cluster.membership import Membership
from moehive.coordinator.cluster.policy import Place
from moehive.coordinator.cluster.server import ClusterServer
from moehive.coordinator.cluster.state import ClusterState
from moehive.coordinator.cluster.store import Store
from moehive.coordinator.cluster.tokens import create_token
from moehive.coordinator.cluster.trust import Authority
from moehive.coordinator.placement.place import place
from moehive.coordinator.types import CoordinatorError, NodeName, Plan
from moehive.expert_node.node import Node
from moehive.kernels.blob import build_blob, tensor_views
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.reference import expert_forward
from moehive.proto import cluster_pb2, experts_pb2, experts_pb2_grpc
from moehive.proto.channel import node_dns_name
from moehive.proto.chunks import Message
from moehive.proto.handshake import metadata
from moehive.proto.tensors import Routing, head_bytes, routing_bytes, write_head

DEADLINE = 60.0  # seconds; only a broken node takes so long


def place_unmeasured(
    capacities: Mapping[NodeName, int], layers: Sequence[LayerGeometry], epoch: int, previous: Plan | None = None
) -> Plan:
    """The plan of a coordinator that has measured nothing yet."""
    return place(capacities, {}, layers, None, epoch, previous)


@dataclass(frozen=True)
class Model:
    """Random experts; `blobs` holds each one's bytes."""

    manifest: Manifest
    blobs: dict[ExpertId, torch.Tensor]

    @classmethod
    def random(cls, spec: ExpertSpec, layers: int, experts: int, seed: int = 0) -> "Model":
        generator = torch.Generator().manual_seed(seed)
        blobs = {
            ExpertId(layer, number): build_blob(
                spec,
                {t.name: torch.randn(t.shape, generator=generator) / t.shape[-1] ** 0.5 for t in spec.tensors},
            )
            for layer in range(layers)
            for number in range(experts)
        }
        digest = hashlib.sha256(b"".join(blob.numpy().tobytes() for blob in blobs.values())).hexdigest()
        return cls(Manifest("random", digest, (LayerGeometry(experts, 2, spec),) * layers), blobs)

    def pairs(self, layer: int, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The plain answer: f32 [pairs, hidden], weighted."""
        spec = self.manifest.layers[layer].spec
        rows = []
        for token in range(len(hidden)):
            for pair in range(routing.offsets[token], routing.offsets[token + 1]):
                views = tensor_views(spec, self.blobs[ExpertId(layer, int(routing.experts[pair]))])
                y = expert_forward(spec, views, hidden[token : token + 1].float())
                rows.append(y[0] * float(routing.weights[pair]))
        return torch.stack(rows) if rows else torch.zeros(0, spec.hidden_size)

    def sums(self, layer: int, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The plain answer: f32 [tokens, hidden]."""
        pairs = self.pairs(layer, hidden, routing)
        spans = zip(routing.offsets[:-1].tolist(), routing.offsets[1:].tolist(), strict=True)
        return torch.stack([pairs[a:b].sum(0) for a, b in spans])


class Slices(SliceSource):
    """The coordinator's own slice source, which can count, cut and lie."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.manifest, model.blobs.__getitem__)
        self.requests: list[cluster_pb2.SliceRequest] = []
        self.cut_after: int | None = None  # chunks, once
        self.tamper: Callable[[cluster_pb2.SliceChunk], None] | None = None

    async def stream(self, request: cluster_pb2.SliceRequest) -> AsyncGenerator[Message]:
        self.requests.append(request)
        sent = 0
        async for message in super().stream(request):
            if self.cut_after is not None and sent >= self.cut_after:
                self.cut_after = None
                raise CoordinatorError("The test has cut the slice.")
            if self.tamper is not None:
                chunk = cluster_pb2.SliceChunk.FromString(b"".join(message))
                self.tamper(chunk)
                message = Message(chunk.SerializeToString(), memoryview(b""))
            yield message
            sent += 1


@dataclass
class Coordinator:
    """The real cluster server of one model; use it on one event loop."""

    folder: Path
    model: Model
    authority: Authority
    slices: Slices
    store: Store
    membership: Membership
    server: ClusterServer
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @classmethod
    async def start(
        cls,
        folder: Path,
        model: Model,
        authority: Authority,
        min_nodes: int = 1,
        ports: tuple[int, int] = (0, 0),
        place: Place = place_unmeasured,
    ) -> "Coordinator":
        await asyncio.to_thread(folder.mkdir, exist_ok=True)
        store = Store(folder / "state.db")
        changed = asyncio.Condition()
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        async def wake() -> None:
            async with changed:
                changed.notify_all()

        def on_change(_: ClusterState) -> None:
            task = loop.create_task(wake())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        membership = Membership(store, model.manifest, min_nodes, 0, on_change, place)
        slices = Slices(model)
        server = ClusterServer(
            authority, store, membership, slices,
            host="127.0.0.1", advertise="127.0.0.1", join_port=ports[0], cluster_port=ports[1],
        )  # fmt: skip
        await server.start()
        return cls(folder, model, authority, slices, store, membership, server, changed)

    def token(self) -> str:
        return str(create_token(self.store, self.server.join_address, self.authority.fingerprint))

    async def until(self, condition: Callable[[ClusterState], bool]) -> None:
        async with asyncio.timeout(DEADLINE), self.changed:
            await self.changed.wait_for(lambda: condition(self.membership.state))

    async def until_ready(self) -> None:
        await self.until(lambda state: state.ready)

    async def compute(self, request: experts_pb2.ComputeRequest, node: str = "a") -> experts_pb2.ComputeReply:
        """One request on a new stream to a node."""
        capacity = self.membership.state.nodes[NodeName(node)].capacity
        assert capacity is not None
        async with open_channel(capacity.address, self.server.identity(), node_dns_name(node)) as channel:
            call = experts_pb2_grpc.ExpertsStub(channel).Compute(metadata=metadata())
            await call.write(request)
            reply: experts_pb2.ComputeReply = await asyncio.wait_for(call.read(), DEADLINE)
            await call.done_writing()
            return reply

    async def stop(self) -> None:
        await self.server.stop()
        self.store.close()


class NodeProcess:
    """`python -m moehive.expert_node` with its log in a file."""

    def __init__(self, log: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self.log = log
        command = [sys.executable, "-m", "moehive.expert_node", "--memory", "64MiB", "--threads", "1", *arguments]
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, stderr=file, env={**os.environ, **environment})
        self.pid = self._process.pid

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    async def wait(self) -> int:
        """The exit code."""
        return await asyncio.to_thread(self._process.wait, DEADLINE)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def text(self) -> str:
        return self.log.read_text()

    def resident(self) -> int:
        """Bytes of its memory."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def end(self) -> None:
        if self.alive:
            self._process.kill()
            self._process.wait(DEADLINE)


StartNode = Callable[..., NodeProcess]


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    """Starts node processes that end with the test."""
    started: list[NodeProcess] = []

    def start(*arguments: Any, state: str = "a", **environment: str) -> NodeProcess:
        words = [str(word) for word in arguments]
        if "--state-dir" not in words:
            words += ["--state-dir", str(tmp_path / state)]
        node = NodeProcess(tmp_path / f"{state}.log", words, environment)
        started.append(node)
        return node

    yield start
    for node in started:
        node.end()


@pytest.fixture
def node_here(speed: bytes) -> Callable[..., AbstractAsyncContextManager[Node]]:
    """See node_here.py."""

    def start_here(state: Path, token: str | None = None, name: str = "a") -> AbstractAsyncContextManager[Node]:
        return running_node(state, speed, token, name)

    return start_here


async def _eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        for _ in itertools.count():
            if condition():
                return
            await asyncio.sleep(0.01)


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Waits for what nobody tells us of, a file for example."""
    return _eventually


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def model() -> Model:
    spec = ExpertSpec(hidden_size=64, intermediate_size=48, activation="silu", format="bf16")
    return Model.random(spec, layers=2, experts=6)


@pytest.fixture(scope="session")
def model_class() -> type[Model]:
    return Model


@pytest.fixture
def coordinator_class(monkeypatch: pytest.MonkeyPatch) -> type[Coordinator]:
    """The class to start coordinators with; what it retries, it retries soon."""
    monkeypatch.setattr(membership_module, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(membership_module, "TICK_SECONDS", 0.2)
    monkeypatch.setattr(membership_module, "SETTLE_SECONDS", 0.1)
    return Coordinator


@pytest.fixture(scope="session")
def make_request() -> Callable[..., tuple[experts_pb2.ComputeRequest, torch.Tensor, Routing]]:
    """A valid random request, with its tensors."""

    def make(
        hidden_size: int, experts: list[int], tokens: int = 1, layer: int = 0, epoch: int = 1,
        dtype: torch.dtype = torch.float32, reduction: Any = experts_pb2.REDUCTION_PARTIAL_SUM, seed: int = 0,
    ) -> tuple[experts_pb2.ComputeRequest, torch.Tensor, Routing]:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
        pairs = [experts[(token + k) % len(experts)] for token in range(tokens) for k in range(2)]
        weights = torch.rand(len(pairs), generator=generator).numpy()
        routing = Routing(np.arange(0, len(pairs) + 1, 2, dtype="<u4"), np.array(pairs, dtype="<u4"), weights)
        request = experts_pb2.ComputeRequest(id=7, epoch=epoch, layer=layer, reduction=reduction)
        states = write_head(request, hidden)
        pieces = head_bytes(request, len(states)), states, routing_bytes(routing)
        return experts_pb2.ComputeRequest.FromString(b"".join(pieces)), hidden, routing

    return make


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
