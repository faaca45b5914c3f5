"""A real coordinator's control plane on loopback, and nodes that speak its protocol by hand."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_channel import open_channel

from moehive.coordinator.checkpoints.slices import SliceSource
from moehive.coordinator.cluster.membership import Membership
from moehive.coordinator.cluster.server import ClusterServer
from moehive.coordinator.cluster.store import Store
from moehive.coordinator.cluster.tokens import create_token
from moehive.coordinator.cluster.trust import Authority
from moehive.coordinator.placement.place import place
from moehive.coordinator.types import CoordinatorError, NodeName, Plan
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.proto import bootstrap, cluster_pb2_grpc
from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import host_port
from moehive.proto.channel import COORDINATOR_NAME, Identity
from moehive.proto.handshake import metadata
from moehive.proto.join_token import JoinToken
from moehive.proto.timing import HEARTBEAT_SECONDS

DEADLINE = 20.0  # seconds that anything here may take before the test fails

SPEC = ExpertSpec(hidden_size=64, intermediate_size=32, activation="silu", format="f32")
MANIFEST = Manifest("tiny", "ab" * 32, (LayerGeometry(8, 2, SPEC), LayerGeometry(6, 2, SPEC)))


def place_unmeasured(
    capacities: Mapping[NodeName, int], layers: Sequence[LayerGeometry], epoch: int, previous: Plan | None = None
) -> Plan:
    """The plan of a coordinator that has measured nothing yet."""
    return place(capacities, {}, layers, None, epoch, previous)


def expert_blob(expert: ExpertId, manifest: Manifest = MANIFEST) -> torch.Tensor:
    """Bytes that differ from expert to expert, uint8 [nbytes]."""
    generator = torch.Generator().manual_seed(expert.layer * 1000 + expert.expert)
    return torch.randint(0, 256, (manifest.nbytes(expert),), dtype=torch.uint8, generator=generator)


def make_csr(name: str = "anything", key: Any = None) -> tuple[bytes, bytes]:
    """A new key (PEM) and a certificate request for it (DER)."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem, csr.public_bytes(serialization.Encoding.DER)


class HandNode:
    """A node driven by the test: joins, attends, and answers as told."""

    def __init__(self, name: str, identity: Identity, address: str) -> None:
        self.name = name
        self.identity = identity
        self.channel = open_channel(address, identity, COORDINATOR_NAME)
        self.stub = cluster_pb2_grpc.ClusterStub(self.channel)  # type: ignore[no-untyped-call]
        self.call: Any = None
        self._writing = asyncio.Lock()

    async def attend(self, ram_bytes: int = 1 << 30, address: str = "127.0.0.1:7") -> None:
        self.call = self.stub.Attend(metadata=metadata())
        hello = pb.NodeHello(address=address, ram_bytes=ram_bytes, read_bandwidth=1e9, threads=1, software="test")
        await self.say(hello=hello)

    async def say(self, **report: Any) -> None:
        async with self._writing:  # gRPC takes one write at a time
            await self.call.write(pb.NodeReport(**report))

    async def hear(self) -> Any:
        """The next directive; grpc.aio.EOF at the stream's end."""
        return await asyncio.wait_for(self.call.read(), DEADLINE)

    async def hear_assign(self) -> pb.AssignSlice:
        directive = await self.hear()
        assert directive.WhichOneof("directive") == "assign", directive
        return directive.assign  # type: ignore[no-any-return]

    async def obey(self) -> None:
        """Loads whatever is assigned, at once, and sends heartbeats, until the stream ends."""
        beats = asyncio.create_task(self._beat())
        try:
            await self._follow()
        finally:
            beats.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await self.say(heartbeat=pb.Heartbeat())

    async def _follow(self) -> None:
        while (directive := await self.call.read()) is not grpc.aio.EOF:
            kind = directive.WhichOneof("directive")
            if kind == "assign":
                await self.say(ready=pb.SliceReady(epoch=directive.assign.epoch))
            elif kind == "release":
                await self.call.done_writing()

    async def close(self) -> None:
        await self.channel.close()


@dataclass
class Harness:
    authority: Authority
    store: Store
    membership: Membership
    server: ClusterServer
    states: list[Any]
    nodes: list[HandNode] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def cluster_address(self) -> str:
        return f"127.0.0.1:{self.server.cluster_port}"

    def token(self, ttl: float = 60.0) -> JoinToken:
        return create_token(self.store, self.server.join_address, self.authority.fingerprint, ttl)

    async def try_join(self, token: JoinToken, name: str, csr: bytes | None = None) -> tuple[bytes, pb.JoinReply]:
        """The node's key and the reply, as a real node does it."""
        key_pem, made = make_csr()
        host, port = host_port(token.address)
        ca_pem = await asyncio.to_thread(bootstrap.fetch_ca, host, port, token.fingerprint)
        async with bootstrap.open_join_channel(token.address, ca_pem) as opened:
            stub = cluster_pb2_grpc.EnrollmentStub(opened)  # type: ignore[no-untyped-call]
            request = pb.JoinRequest(token_secret=token.secret_text, node_name=name, csr_der=csr or made)
            return key_pem, await stub.Join(request, metadata=metadata(), timeout=DEADLINE)

    async def join(self, name: str) -> HandNode:
        key_pem, reply = await self.try_join(self.token(), name)
        identity = Identity(key_pem, reply.certificate_pem, self.authority.ca_pem)
        assert reply.cluster_address == self.cluster_address
        node = HandNode(name, identity, reply.cluster_address)
        self.nodes.append(node)
        return node

    async def join_obedient(self, name: str, ram_bytes: int = 1 << 30) -> HandNode:
        node = await self.join(name)
        await node.attend(ram_bytes)
        self.obey(node)
        return node

    def obey(self, node: HandNode) -> None:
        self.tasks.append(asyncio.create_task(node.obey()))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until a change of the cluster's state makes `condition` true."""
        async with asyncio.timeout(DEADLINE):
            while not condition():
                await self.membership._changes.next()


@asynccontextmanager
async def run_cluster(
    folder: Path,
    *,
    min_nodes: int = 1,
    local_bytes: int = 0,
    manifest: Manifest = MANIFEST,
    cluster_port: int = 0,
    read: Callable[[ExpertId], torch.Tensor] | None = None,
) -> AsyncIterator[Harness]:
    try:
        authority = Authority.create(folder / "ca")
    except CoordinatorError:  # started before
        authority = Authority.load(folder / "ca")
    store = Store(folder / "coordinator.sqlite")
    states: list[Any] = []
    membership = Membership(store, manifest, min_nodes, local_bytes, states.append, place_unmeasured)
    slices = SliceSource(manifest, read or (lambda expert: expert_blob(expert, manifest)))
    server = ClusterServer(
        authority,
        store,
        membership,
        slices,
        host="127.0.0.1",
        advertise="127.0.0.1",
        join_port=0,
        cluster_port=cluster_port,
    )
    await server.start()
    harness = Harness(authority, store, membership, server, states)
    try:
        yield harness
    finally:
        for task in harness.tasks:
            task.cancel()
        await asyncio.gather(*harness.tasks, return_exceptions=True)
        for node in harness.nodes:
            await node.close()
        await server.stop()
        store.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[Harness]]:
    """Starts a control plane in this test's folder: `async with cluster(min_nodes=2) as harness`."""
    return lambda **settings: run_cluster(tmp_path / "state", **settings)


@pytest.fixture
def csr() -> Callable[..., tuple[bytes, bytes]]:
    return make_csr


@pytest.fixture
def hand_node() -> type[HandNode]:
    return HandNode


@pytest.fixture
def manifest() -> Manifest:
    return MANIFEST


@pytest.fixture
def blob() -> Callable[..., torch.Tensor]:
    return expert_blob


@pytest.fixture
def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
