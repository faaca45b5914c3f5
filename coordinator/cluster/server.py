"""Starts and stops the two internal doors and the membership behind them.

The members' door is the wire's own server, since experts leave through it; who joins knows gRPC's library only.
"""

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio

from moehive.proto import channel, cluster_pb2_grpc
from moehive.proto.bounds import join_host_port
from moehive.proto.interceptor import CallGuard
from moehive.proto.pacing import Pace
from moehive.proto.wire.server import Server
from moehive.proto.wire.tls import server_context

from ..checkpoints.slices import ExpertUnreadable, SliceMismatch, SliceSource
from ..types import CoordinatorError
from .membership import Membership
from .rates import LoadRates
from .records import save_join_address
from .service import ClusterService, EnrollmentService, NameTaken, NotAllowed
from .session import SessionEnded
from .sources import Sources
from .store import Store
from .tokens import TokenRefused
from .trust import Authority

JOIN_BYTES = 64 << 10  # a stranger's message is not larger
JOINS_AT_ONCE = 32
STOP_SECONDS = 2.0  # for calls to end by themselves

STATUSES: dict[type[Exception], grpc.StatusCode] = {
    TokenRefused: grpc.StatusCode.UNAUTHENTICATED,
    NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    NameTaken: grpc.StatusCode.ALREADY_EXISTS,
    SessionEnded: grpc.StatusCode.ABORTED,
    SliceMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    ExpertUnreadable: grpc.StatusCode.FAILED_PRECONDITION,  # asking again at once does not mend the files
    CoordinatorError: grpc.StatusCode.UNAVAILABLE,  # after the kinds that are more exact
}


class ClusterServer:
    """Enrollment and Cluster on two ports of one host.

    `advertise` is the host name or address by which nodes reach this machine. Port 0 means any free one; after
    `start`, `join_port` and `cluster_port` are the real ones. `identity` is the coordinator's own, for dispatch too.
    """

    def __init__(
        self,
        authority: Authority,
        store: Store,
        membership: Membership,
        slices: SliceSource,
        *,
        host: str,
        advertise: str,
        join_port: int,
        cluster_port: int,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """`busy`: whether requests are being answered, so that experts are to be sent at leisure."""
        self.identity = authority.renewing(authority.issue_coordinator)
        self.join_port = join_port
        self.cluster_port = cluster_port
        self._authority = authority
        self._store = store
        self._membership = membership
        self._slices = slices
        self._pace = Pace(busy)
        self.rates = LoadRates()
        self.sources = Sources(lambda: membership.state, membership.manifest.nbytes)
        self._host = host
        self._advertise = advertise
        self._servers: list[grpc.aio.Server | Server] = []

    @property
    def join_address(self) -> str:
        """host:port for join tokens."""
        return join_host_port(self._advertise, self.join_port)

    async def start(self) -> None:
        """Raises OSError when a port is taken, CoordinatorError when the store fails."""
        guard = CallGuard(STATUSES)
        join = grpc.aio.server(
            interceptors=[guard], options=channel.options(JOIN_BYTES), maximum_concurrent_rpcs=JOINS_AT_ONCE
        )
        # The chain has the CA's certificate too: by it a new node checks its token's fingerprint.
        credentials = channel.server_credentials(self.identity)
        self.join_port = channel.bind(join, self._host, self.join_port, credentials)
        await self._membership.start()
        cluster = Server(guard, channel.MAX_CONTROL_BYTES)
        cluster_pb2_grpc.add_ClusterServicer_to_server(
            ClusterService(
                self._authority, self._store, self._membership, self._slices, self.sources, self.rates, self._pace
            ),
            cluster,
        )
        self.cluster_port = await cluster.listen(self._host, self.cluster_port, server_context(self.identity))
        self._servers.append(cluster)
        address = join_host_port(self._advertise, self.cluster_port)
        cluster_pb2_grpc.add_EnrollmentServicer_to_server(
            EnrollmentService(self._authority, self._store, self._membership, address), join
        )
        save_join_address(self._store, self.join_address)
        self._servers.append(join)
        await join.start()

    async def stop(self) -> None:
        """Releases nodes that are leaving, ends all streams and closes both ports."""
        stops = [server.stop(STOP_SECONDS) for server in self._servers]  # no new calls from here on
        await asyncio.gather(self._membership.stop(), *stops)
