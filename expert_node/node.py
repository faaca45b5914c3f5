"""The node's life: identity, store, service, agent; from start to a clean end."""

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

import grpc
import torch

from moehive.kernels.gpu.failures import why
from moehive.kernels.machine import available_memory
from moehive.kernels.ops import ExpertOps
from moehive.proto import cluster_pb2 as pb
from moehive.proto import cluster_pb2_grpc, experts_pb2_grpc
from moehive.proto.bounds import MAX_SOFTWARE, join_host_port
from moehive.proto.ending import end_now, end_soon
from moehive.proto.handshake import software_version
from moehive.proto.interceptor import CallGuard
from moehive.proto.malloc import settle_heap
from moehive.proto.pacing import Pace
from moehive.proto.sd_notify import notify, watchdog_interval
from moehive.proto.tensors import WireError
from moehive.proto.wire.server import Server
from moehive.proto.wire.tls import server_context

from . import measure
from .agent import Agent
from .chain import Onward
from .courtesy import give_way, own_and_other
from .executor import Executor
from .fetch import SliceLoader
from .files import lock_folder
from .footprint import give_back
from .identity import NodeIdentity, obtain
from .peers import PeerService
from .service import ExpertsService
from .settings import Settings, default_name
from .store import ExpertStore
from .tiers import capacity
from .types import ConfigError, NodeError
from .uplink import Uplink

if TYPE_CHECKING:
    from .tiers.gpu import GpuTier

log = logging.getLogger(__name__)

STOP_SECONDS = 2.0  # for requests in hand at the end
_WILDCARDS = frozenset({"0.0.0.0", "::"})


async def run(settings: Settings) -> None:
    """Runs a node until SIGTERM, SIGINT or its release, and ends the process then.

    Raises NodeError and ConfigError, one sentence each.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with lock_folder(settings.state):
        starting = asyncio.create_task(start(settings))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # nothing was promised to anybody yet
            end_now()
        node = starting.result()
        stopped.add_done_callback(lambda _: end_soon())  # when it is released, too: it is cancelled then
        settle_heap()
        try:
            await node.serve(stopped)
        finally:
            stopped.cancel()
            await node.close()
        end_now()


class Node:
    """A node that has joined and listens."""

    def __init__(
        self,
        identity: NodeIdentity,
        uplink: Uplink,
        onward: Onward,
        service: ExpertsService,
        server: Server,
    ) -> None:
        self._identity = identity
        self._onward = onward
        self._uplink = uplink
        self._service = service
        self._server = server
        self._said_ready = False
        self.agent: Agent

    async def serve(self, stopped: "asyncio.Task[bool]") -> None:
        """Attends the coordinator until released, or until `stopped` and then released."""
        attending = asyncio.create_task(self.agent.run())
        watchdog = asyncio.create_task(_feed_watchdog())
        try:
            await asyncio.wait({attending, stopped}, return_when=asyncio.FIRST_COMPLETED)
            notify(stopping=True, status="Leaving the cluster.")
            if not attending.done():
                log.info("Leaving the cluster.")
                await self.agent.leave()
                attending.cancel()
            await asyncio.wait({attending})
            if not attending.cancelled():
                attending.result()
        finally:
            watchdog.cancel()
            if not attending.done():
                attending.cancel()
                await asyncio.wait({attending})

    async def close(self) -> None:
        """Refuses further requests, answers those in hand, ends."""
        self._service.draining = True
        await self._server.stop(STOP_SECONDS)
        await self._service.close()
        await self._onward.close()
        await self._uplink.close()
        log.info("Node %s has ended.", self._identity.name)

    def tell(self) -> None:
        """Passes the agent's state on to systemd."""
        ready = self.agent.ready and not self._said_ready
        self._said_ready |= ready
        notify(ready=ready, status=self.agent.state)


async def start(settings: Settings) -> Node:
    """Joins, measures, listens. Raises NodeError and ConfigError."""
    notify(status="Joining the cluster.")
    identity = await obtain(settings.state, settings.token, settings.name, default_name())
    give_way(identity.cluster_address)
    memory = settings.memory_bytes
    if memory is None:
        memory = capacity.memory_for_experts(available_memory())
    disk = settings.disk_bytes
    if disk is None:
        disk = await asyncio.to_thread(capacity.disk_for_experts, settings.state / "cache")
    give_back()
    speed = await asyncio.to_thread(measure.speed, settings.state, settings.threads)
    torch.set_num_threads(settings.threads)
    ops = ExpertOps(settings.threads)
    gpu = _gpu(settings, ops)
    store = ExpertStore(memory, disk, gpu)
    executor = Executor(store, ops)
    uplink = Uplink(identity)
    onward = Onward(identity.current)
    service = ExpertsService(executor, onward)
    loader = SliceLoader(store, settings.state / "cache", uplink)

    host, port = settings.listen or (_own_address(identity.cluster_address), 0)
    server = Server(CallGuard({WireError: grpc.StatusCode.INVALID_ARGUMENT}))
    experts_pb2_grpc.add_ExpertsServicer_to_server(service, server)
    cluster_pb2_grpc.add_PeersServicer_to_server(PeerService(loader.file_of, Pace(lambda: service.busy)), server)
    try:
        port = await server.listen(host, port, server_context(identity.current))
    except OSError as error:
        raise ConfigError(str(error)) from error
    reached = _own_address(identity.cluster_address) if host in _WILDCARDS and not settings.advertise else host
    address = settings.advertise or join_host_port(reached, port)
    log.info("Node %s listens on %s and gives %.2f GB to experts.", identity.name, address, memory / 1e9)

    hello = pb.NodeHello(
        address=address,
        ram_bytes=memory,
        disk_bytes=disk,
        vram_bytes=0 if gpu is None else gpu.capacity_bytes,
        read_bandwidth=speed.read_bandwidth,
        products_per_s=speed.products_per_s,
        token_products_per_s=speed.token_products_per_s,
        threads=settings.threads,
        software=f"moehive {software_version()}"[:MAX_SOFTWARE],
    )
    node = Node(identity, uplink, onward, service, server)
    node.agent = Agent(identity, uplink, hello, store, loader, executor.totals, node.tell)
    return node


def _gpu(settings: Settings, ops: ExpertOps) -> "GpuTier | None":
    """A GPU's memory as the fastest tier, where there is one that can be used."""
    if settings.vram_bytes == 0 or not torch.cuda.is_available():
        return None
    try:
        from .tiers.gpu import GpuTier, free_bytes  # needs Triton, which comes with torch for a GPU

        device = torch.device("cuda", torch.cuda.current_device())
        capacity = free_bytes(device) if settings.vram_bytes is None else settings.vram_bytes
        tier = GpuTier(device, capacity, ops)
        name = torch.cuda.get_device_name(device)
    except Exception as error:  # of torch or the driver: their kinds are many
        log.warning("This node computes on the CPU; its GPU can't be used: %s.", why(error))
        return None
    log.info("%s holds %.2f GB of the experts that are used most.", name, capacity / 1e9)
    return tier


def _own_address(coordinator: str) -> str:
    """The address of this machine that packets to the coordinator leave from. Raises NodeError."""
    try:
        return own_and_other(coordinator)[0]
    except OSError as error:
        raise NodeError(
            f"This machine has no way to the coordinator at {coordinator} ({error.strerror or error}): check the "
            "network, or say --listen and --advertise."
        ) from error


async def _feed_watchdog() -> None:
    """From the loop that does the work: a loop that hangs is restarted."""
    interval = watchdog_interval()
    while interval is not None:
        notify(watchdog=True)
        await asyncio.sleep(interval)
