"""Channels to the coordinator, always opened with the newest certificate."""

import ipaddress

import grpc.aio

from moehive.proto import cluster_pb2_grpc
from moehive.proto.bounds import host_port
from moehive.proto.channel import COORDINATOR_NAME, Identity, open_channel

from .identity import NodeIdentity


class Uplink:
    """Hands out stubs of the Cluster service; use it on one event loop."""

    def __init__(self, identity: NodeIdentity) -> None:
        self._identity = identity
        self._open: tuple[Identity, grpc.aio.Channel] | None = None
        self._old: list[grpc.aio.Channel] = []  # may carry the control stream still

    @property
    def address(self) -> str:
        """host:port of the coordinator."""
        return self._identity.cluster_address

    def identity(self) -> Identity:
        """The node's key and newest certificate."""
        return self._identity.current()

    def stub(self) -> cluster_pb2_grpc.ClusterStub:
        """A stub on a channel that uses the present certificate."""
        current = self._identity.current()
        if self._open is None or self._open[0] is not current:
            if self._open is not None:
                self._old.append(self._open[1])
            self._open = (current, open_channel(self._identity.cluster_address, current, COORDINATOR_NAME))
        return cluster_pb2_grpc.ClusterStub(self._open[1])

    async def close_old(self) -> None:
        """Closes the channels of earlier certificates; only when no call is on them."""
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
