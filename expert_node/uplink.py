"""The node's own calls to the coordinator, on a channel that is always opened with the newest certificate."""

import ipaddress

from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import host_port
from moehive.proto.channel import COORDINATOR_NAME, Identity
from moehive.proto.handshake import metadata
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.methods import ATTEND, HASH_EXPERTS, LOCATE, RENEW
from moehive.proto.wire.stream import Stream

from .identity import NodeIdentity

RENEW_SECONDS = 30.0
ANSWER_SECONDS = 60.0  # of the coordinator, for a few bytes


class Uplink:
    """Connects when a call needs it; use it on one event loop."""

    def __init__(self, identity: NodeIdentity) -> None:
        self._identity = identity
        self._open: tuple[Identity, Channel] | None = None
        self._old: list[Channel] = []  # may carry the control stream still

    @property
    def address(self) -> str:
        """host:port of the coordinator."""
        return self._identity.cluster_address

    def identity(self) -> Identity:
        """The node's key and newest certificate."""
        return self._identity.current()

    async def attend(self) -> Stream:
        """Opens the control stream: serialized NodeReports there, Directives back. Raises AioRpcError."""
        return await self._channel().open(ATTEND, metadata())

    async def renew(self, request: pb.RenewRequest) -> pb.RenewReply:
        """Cluster.Renew. Raises AioRpcError."""
        ask = self._channel().unary_unary(RENEW, pb.RenewRequest.SerializeToString, pb.RenewReply.FromString)
        reply: pb.RenewReply = await ask(request, metadata(), RENEW_SECONDS)
        return reply

    async def locate(self, request: pb.LocateRequest) -> pb.LocateReply:
        """Cluster.Locate. Raises AioRpcError."""
        ask = self._channel().unary_unary(LOCATE, pb.LocateRequest.SerializeToString, pb.LocateReply.FromString)
        reply: pb.LocateReply = await ask(request, metadata(), ANSWER_SECONDS)
        return reply

    async def hash_experts(self, request: pb.HashRequest) -> pb.HashReply:
        """Cluster.HashExperts. Raises AioRpcError."""
        ask = self._channel().unary_unary(HASH_EXPERTS, pb.HashRequest.SerializeToString, pb.HashReply.FromString)
        reply: pb.HashReply = await ask(request, metadata(), ANSWER_SECONDS)
        return reply

    def _channel(self) -> Channel:
        current = self._identity.current()
        if self._open is None or self._open[0] is not current or self._open[1].over:
            if self._open is not None:
                self._old.append(self._open[1])
            self._open = current, Channel(self.address, current, COORDINATOR_NAME)
        return self._open[1]

    async def close_old(self) -> None:
        """Closes the channels of earlier certificates and connections; only when no call is on them."""
        while self._old:
            await self._old.pop().close()

    async def close(self) -> None:
        """Ends every call."""
        await self.close_old()
        if self._open is not None:
            await self._open[1].close()
            self._open = None


def is_loopback(address: str) -> bool:
    """Whether host:port is this machine by its loopback, where bytes cost less than making them fewer."""
    host = host_port(address)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
