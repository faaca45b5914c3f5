"""The coordinator's two internal doors: Enrollment (TLS, a token) and Cluster (mutual TLS, a node's certificate).

The services check and translate; what follows is decided in membership.py. A node is who its certificate says,
never who a message says.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio

from moehive.kernels.geometry import ExpertId
from moehive.kernels.manifest import to_bytes
from moehive.proto import bounds, channel, cluster_pb2_grpc
from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import BoundsError
from moehive.proto.chunks import Message
from moehive.proto.pacing import Pace
from moehive.proto.wire.server import Context

from ..checkpoints.slices import SliceSource
from ..types import LOCAL, CoordinatorError, NodeName
from .events import (
    Event,
    HeartbeatReceived,
    NodeLeaving,
    SliceHeld,
    SliceNotHeld,
    SliceProgressed,
)
from .membership import Membership
from .rates import LoadRates
from .records import admit_node, is_revoked, quarantined_nodes, renew_node
from .session import Assign, Commit, Direction, Session
from .sources import Sources
from .state import Capacity, Figures, TierFigures
from .store import Store
from .tokens import use_token
from .trust import Authority

HELLO_SECONDS = 10.0  # from a control stream's opening to its first message
NODE_SUFFIX = channel.node_dns_name("")  # of a node certificate's name

JoinContext: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class NotAllowed(CoordinatorError):
    """The caller's certificate does not allow what it asks for."""


class NameTaken(CoordinatorError):
    """A node of this name is in the cluster now."""


class EnrollmentService(cluster_pb2_grpc.EnrollmentServicer):
    """Lets nodes in that have a token."""

    def __init__(self, authority: Authority, store: Store, membership: Membership, cluster_address: str) -> None:
        self._authority = authority
        self._store = store
        self._membership = membership
        self._cluster_address = cluster_address  # host:port, as the nodes reach it

    async def Join(self, request: pb.JoinRequest, context: JoinContext) -> pb.JoinReply:
        """Spends the token and gives a certificate: both or neither."""
        bounds.check_join(request)
        chain = await asyncio.to_thread(self._admit, request)
        return pb.JoinReply(certificate_pem=chain, cluster_address=self._cluster_address)

    def _admit(self, request: pb.JoinRequest) -> bytes:
        name = NodeName(request.node_name)
        now = self._store.clock()
        with self._store.transaction() as db:
            use_token(db, request.token_secret, name, now)
            node = self._membership.state.nodes.get(name)
            if name == LOCAL or (node is not None and node.present):
                raise NameTaken(f"The name {name!r} is taken in this cluster; start the node with another --name.")
            chain, expires = self._authority.issue_node(name, request.csr_der)
            admit_node(db, name, expires.timestamp(), now)
        return chain


class ClusterService(cluster_pb2_grpc.ClusterServicer):
    """What nodes that are in the cluster ask and report."""

    def __init__(
        self,
        authority: Authority,
        store: Store,
        membership: Membership,
        slices: SliceSource,
        sources: Sources,
        rates: LoadRates,
        pace: Pace,
    ) -> None:
        self._authority = authority
        self._store = store
        self._membership = membership
        self._slices = slices
        self._sources = sources
        self._rates = rates
        self._pace = pace
        self._manifest = to_bytes(membership.manifest)

    async def Attend(
        self, request_iterator: AsyncIterator[pb.NodeReport], context: Context
    ) -> AsyncIterator[pb.Directive]:
        """One node's control stream, until either side ends it."""
        # First: gRPC's own client learns nothing of why a call ended that ends before its first message has left.
        hello = await _hello(request_iterator, context)
        name = self._caller(context)
        session = self._membership.arrive(name, hello)
        reading = asyncio.create_task(self._read(session, request_iterator))
        reading.add_done_callback(lambda _: session.end())
        try:
            async for direction in session.directions():
                if isinstance(direction, Assign):
                    await self._pace.begin()  # nodes of a new plan load it one after the other
                yield self._directive(direction)
            if reading.done():
                reading.result()  # raises what was wrong with the last report
        finally:
            self._membership.depart(session)
            self._sources.forget(name)
            self._rates.forget(name)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def FetchSlice(self, request: pb.SliceRequest, context: Context) -> AsyncIterator[Message]:
        """See checkpoints/slices.py."""
        self._caller(context)
        async for chunk in self._pace.chunks(self._slices.stream(request), context.caller.host):
            yield chunk

    async def Locate(self, request: pb.LocateRequest, context: Context) -> pb.LocateReply:
        """See sources.py."""
        name = self._caller(context)
        bounds.check_locate(request)
        experts = [expert for expert, _ in self._slices.named(request.fingerprint, request.experts)]
        for fault in request.faults:
            self._sources.report(name, NodeName(fault.node_name), ExpertId(fault.layer, fault.expert))
        located = self._sources.locate(name, experts, {NodeName(node) for node in request.avoid})
        peers = sorted({source for source in located if source is not None})
        numbers = {source: number for number, source in enumerate(peers, 1)}
        reply = pb.LocateReply(sources=[0 if source is None else numbers[source] for source in located])
        for peer in peers:
            capacity = self._membership.state.nodes[peer].capacity
            reply.peers.add(node_name=peer, address=capacity.address if capacity else "")
        return reply

    async def HashExperts(self, request: pb.HashRequest, context: Context) -> pb.HashReply:
        """See checkpoints/slices.py."""
        self._caller(context)
        return pb.HashReply(digests=await self._slices.hashes(request))

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewReply:
        """A new certificate for the caller's name, whatever name the request has."""
        name = self._caller(context)
        if self._authority.expired(context.caller.certificate):  # the connection has outlived it
            raise NotAllowed("The node's certificate has expired; let it join again with a new token.")
        bounds.check_csr(request.csr_der)
        chain = await asyncio.to_thread(self._renew, name, request.csr_der)
        return pb.RenewReply(certificate_pem=chain)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        """Moves the caller's experts to the others; answers when they serve, or why it can't be done."""
        bounds.check_drain(request)
        name = self._caller(context)
        if request.node_name != name:
            raise NotAllowed(f"Node {name} may drain itself only, not {request.node_name}.")
        try:
            await self._membership.release(name)
        except CoordinatorError as error:
            return pb.DrainReply(released=False, sentence=str(error)[: bounds.MAX_SENTENCE])
        return pb.DrainReply(released=True)

    def _caller(self, context: Context) -> NodeName:
        """The node's name from its certificate. Raises NotAllowed."""
        names = [name for name in channel.peer_names(context) if name.endswith(NODE_SUFFIX)]
        if len(names) != 1:
            raise NotAllowed("Only an expert node may ask this; the caller's certificate is not a node's.")
        name = NodeName(bounds.node_name(names[0].removesuffix(NODE_SUFFIX)))
        if is_revoked(self._store, name):
            raise NotAllowed(f"Node {name} was shut out of this cluster; let it join again with a new token.")
        if why := quarantined_nodes(self._store).get(name):
            raise NotAllowed(f"{why} This node is quarantined until `moehive node readmit {name}`.")
        return name

    def _renew(self, name: NodeName, csr_der: bytes) -> bytes:
        chain, expires = self._authority.issue_node(name, csr_der)
        renew_node(self._store, name, expires.timestamp())
        return chain

    async def _read(self, session: Session, reports: AsyncIterator[pb.NodeReport]) -> None:
        async for report in reports:
            bounds.check_report(report)
            self._note_load(session.name, report)
            self._membership.report(session, _event(session.name, report))

    def _note_load(self, name: NodeName, report: pb.NodeReport) -> None:
        kind = report.WhichOneof("report")
        if kind == "progress":
            now = asyncio.get_running_loop().time()
            self._rates.note(name, report.progress.epoch, report.progress.bytes_done, now)
        elif kind in ("ready", "failed"):
            self._rates.forget(name)

    def _directive(self, direction: Direction) -> pb.Directive:
        if isinstance(direction, Assign):
            assign = pb.AssignSlice(epoch=direction.epoch, manifest=self._manifest)
            for layer, experts in enumerate(direction.layers):
                if not experts:
                    continue
                part = assign.layers.add(layer=layer, experts=experts)
                if direction.pins is not None:
                    part.in_ram.extend(direction.pins.in_ram[layer])
                    part.in_vram.extend(direction.pins.in_vram[layer])
            return pb.Directive(assign=assign)
        if isinstance(direction, Commit):
            return pb.Directive(commit=pb.CommitEpoch(epoch=direction.epoch))
        return pb.Directive(release=pb.Release())


async def _hello(reports: AsyncIterator[pb.NodeReport], context: Context) -> Capacity:
    """The stream's first message. Raises BoundsError when it is another or does not come."""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            report = await anext(reports)
    except (TimeoutError, StopAsyncIteration) as error:
        raise BoundsError("A control stream starts with a NodeHello; none came.") from error
    bounds.check_report(report)
    if report.WhichOneof("report") != "hello":
        raise BoundsError("A control stream starts with a NodeHello, not with another report.")
    hello = report.hello
    return Capacity(
        _reachable(hello.address, context.caller.host),
        hello.ram_bytes,
        hello.read_bandwidth,
        hello.threads,
        hello.software,
        hello.disk_bytes,
        hello.vram_bytes,
        hello.products_per_s,
        hello.token_products_per_s,
    )


def _reachable(address: str, calling: str) -> str:
    """A node that listens on all of its addresses is reached at the one that it calls from."""
    host, port = bounds.host_port(address)
    return bounds.join_host_port(calling, port) if host in ("0.0.0.0", "::") else address


def _tiers(tiers: pb.Tiers) -> TierFigures:
    return TierFigures(
        tiers.ram_bytes,
        tiers.disk_bytes,
        tiers.vram_bytes,
        tiers.lookups,
        tiers.in_ram,
        tiers.foreseen,
        tiers.disk_read_bytes,
        tiers.disk_bandwidth,
    )


def _event(name: NodeName, report: pb.NodeReport) -> Event:
    match report.WhichOneof("report"):
        case "heartbeat":
            beat = report.heartbeat
            figures = Figures(
                beat.experts_held,
                beat.bytes_held,
                beat.calls,
                beat.expert_calls,
                beat.compute_ns,
                beat.resident_bytes,
                beat.load,
                _tiers(beat.tiers) if beat.HasField("tiers") else None,
            )
            return HeartbeatReceived(name, figures)
        case "progress":
            progress = report.progress
            return SliceProgressed(name, progress.epoch, progress.bytes_done, progress.bytes_total)
        case "ready":
            return SliceHeld(name, report.ready.epoch)
        case "failed":
            return SliceNotHeld(name, report.failed.epoch, report.failed.sentence)
        case "leaving":
            return NodeLeaving(name)
        case _:
            raise BoundsError("Only the first message of a control stream is a NodeHello.")
