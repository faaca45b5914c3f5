"""The coordinator, wired: checkpoint, trust, cluster, trunk, dispatcher, engine, and the two public doors."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic

import psutil
import torch

from moehive.kernels.geometry import ExpertId, LayerGeometry
from moehive.kernels.ops import Reduction

from .checkpoints.opening import ModelSource, open_model
from .checkpoints.outline import Outlines
from .checkpoints.pack.checkpoint import PackCheckpoint
from .checkpoints.slices import SliceSource
from .cluster.membership import Membership
from .cluster.server import ClusterServer
from .cluster.store import Store
from .cluster.tokens import create_token
from .cluster.trust import Authority
from .dispatch.dispatcher import Dispatcher
from .dispatch.fallback import Fallback
from .dispatch.local import LocalExperts
from .dispatch.parts import NodeCounters
from .engine.engine import Engine
from .follower import Follower
from .known_nodes import measured, node_status
from .placement.place import Measured
from .public_doors import PublicDoors
from .serving.generation import GenerationService
from .serving.status import ClusterStatus, ModelInfo, NodeStatus
from .serving.text import Text
from .settings import CoordinatorSettings, home
from .traffic import REPLAN_SECONDS, Traffic, statistics_path
from .trunk import load_trunk
from .types import LOCAL, CoordinatorError, NodeName, Plan

log = logging.getLogger(__name__)

LINK_SECONDS = 0.25  # that a plan waits for links to be opened and measured, at most


class Coordinator:
    """Everything that runs in the coordinator's process: `start`, `wait_ready`, `stop`, on one event loop."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self.settings = settings
        self.grpc_port = self.http_port = self.cluster_port = self.join_port = 0  # real ones after `start`
        self.cluster_open = asyncio.Event()  # set in the middle of `start`: nodes can join, tokens can be issued
        self._started = monotonic()
        self._cleanup = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Opens the checkpoint, lets nodes in while the trunk is loaded, then opens the doors.

        Raises CoordinatorError, or OSError for a port in use, one sentence; nothing is left running then.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends generations with a sentence, closes doors, links and ports."""
        await self._cleanup.aclose()

    async def wait_ready(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - its error says what is missing
        """Returns once every expert can be asked for. Raises CoordinatorError after `timeout` seconds."""
        await self._follower.wait_reachable(timeout)

    def issue_token(self, ttl_seconds: float) -> str:
        """A join token for one node, good for `ttl_seconds`."""
        token = create_token(self._store, self._server.join_address, self._authority.fingerprint, ttl_seconds)
        return str(token)

    @property
    def plan(self) -> Plan | None:
        """The plan in force, once there is one."""
        return self._membership.state.active

    async def improve(self, find: Callable[[Mapping[NodeName, int], int, Plan], Plan | None]) -> None:
        """Loads a plan over the same nodes, if `find`, on a thread, has one for their bytes and the plan in force."""
        await self._membership.planner.improve(find)

    def status(self) -> ClusterStatus:
        """The nodes and whether requests can be served, as of now."""
        state = self._membership.state
        return ClusterStatus(
            ready=self._follower.reachable,
            has_plan=state.active is not None,
            cache_margin=self.settings.cache_margin,
            reason=self._follower.reason(),
            epoch=self.dispatcher.epoch,
            nodes=tuple(self._node_status(name) for name in state.nodes),
            resident_bytes=psutil.Process().memory_info().rss,
            uptime_seconds=monotonic() - self._started,
        )

    def _quarantine(self, node: NodeName, sentence: str) -> None:
        self._membership.quarantine(node, sentence)

    async def _start(self) -> None:
        settings = self.settings
        torch.set_grad_enabled(False)  # of this thread, the one that runs forward passes
        torch.set_num_threads(settings.threads)
        self._authority = Authority.load(settings.state_dir / "ca")  # first: its error says to run `moehive init`
        self._store = Store(settings.state_dir / "coordinator.sqlite")
        self._cleanup.callback(self._store.close)
        doors = PublicDoors(settings, self._store, self._authority)
        checkpoint = await asyncio.to_thread(open_model, settings.model, Outlines(home() / "outlines"))
        self.manifest = manifest = checkpoint.manifest
        self.model_name = manifest.name  # by which clients may ask for it
        self._local = LocalExperts(manifest, settings.threads) if settings.local_bytes else None
        reduction = Reduction.PER_EXPERT if settings.deterministic else Reduction.PARTIAL_SUM
        self.fallback: Fallback | None = None
        if settings.fallback_bytes:
            self.fallback = Fallback(manifest, checkpoint.expert_blob, settings.fallback_bytes, settings.threads)
            self._cleanup.push_async_callback(self.fallback.stop)
        self.dispatcher = Dispatcher(
            manifest,
            self._local,
            reduction,
            self.fallback,
            self._quarantine,
            cache_margin=settings.cache_margin,
            read=checkpoint.expert_blob,
        )
        self._cleanup.push_async_callback(self.dispatcher.stop)
        self._traffic = Traffic(statistics_path(settings.state_dir, manifest), manifest)
        self.dispatcher.statistics = self._traffic.statistics
        self._cleanup.push_async_callback(self._traffic.stop)
        self._traffic.start()
        await self._start_cluster(checkpoint)

        device = "cpu" if settings.deterministic else settings.trunk_device
        self.trunk = trunk = await asyncio.to_thread(
            load_trunk, checkpoint, settings.threads, device, settings.kv_bytes
        )
        self.kv_bytes = settings.kv_bytes if trunk.cache_room is None else min(settings.kv_bytes, trunk.cache_room)
        engine = Engine(trunk, self.dispatcher, self.kv_bytes)
        self._cleanup.push_async_callback(engine.shutdown)
        text = Text(*await asyncio.to_thread(checkpoint.tokenizer))
        info = ModelInfo(
            id=manifest.name,
            family=checkpoint.family,
            context_length=trunk.context_length,
            vocabulary=trunk.vocab_size,
            moe_layers=len(manifest.layers),
            experts_per_layer=max(layer.experts for layer in manifest.layers),
            expert_bytes=manifest.total_bytes,
        )
        self._cleanup.push_async_callback(doors.stop)
        await doors.start(GenerationService(engine, text, info, self.status))
        self.grpc_port, self.http_port = doors.grpc_port, doors.http_port

    async def _start_cluster(self, checkpoint: ModelSource) -> None:
        settings, manifest = self.settings, checkpoint.manifest
        # The follower is told of changes, and asks back: each needs the other, so one is named later.
        follower = Follower(self.dispatcher, self._local, checkpoint.expert_blob, lambda: self._server.identity())
        membership = Membership(
            self._store,
            manifest,
            settings.min_nodes,
            settings.local_bytes,
            on_change=follower.changed,
            place=partial(self._place, asyncio.get_running_loop()),
        )
        follower.follow(membership)
        self._follower, self._membership = follower, membership
        self._server = ClusterServer(
            self._authority,
            self._store,
            membership,
            SliceSource(manifest, checkpoint.expert_blob, _known_hashes(checkpoint)),
            host=settings.cluster_host,
            advertise=settings.cluster_advertise,
            join_port=settings.join_port,
            cluster_port=settings.cluster_port,
            busy=lambda: self.dispatcher.busy,
        )
        self._cleanup.push_async_callback(self._server.stop)
        self._cleanup.push_async_callback(follower.stop)
        await self._server.start()
        self.cluster_port, self.join_port = self._server.cluster_port, self._server.join_port
        self.cluster_open.set()
        replanning = asyncio.create_task(self._replan_forever())
        self._cleanup.callback(replanning.cancel)

    async def _replan_forever(self) -> None:
        """Follows the traffic: now and then a better plan is looked for, and loaded if it pays."""
        while True:
            await asyncio.sleep(REPLAN_SECONDS)
            try:
                await self.improve(self._better_for_traffic)
            except CoordinatorError as error:
                log.warning("No better plan: %s", error)

    def _better_for_traffic(self, capacities: Mapping[NodeName, int], epoch: int, current: Plan) -> Plan | None:
        return self._traffic.better(self._measured(), self.manifest.layers, capacities, epoch, current)

    def _place(
        self,
        loop: asyncio.AbstractEventLoop,
        capacities: Mapping[NodeName, int],
        layers: Sequence[LayerGeometry],
        epoch: int,
        previous: Plan | None = None,
    ) -> Plan:
        """See placement/place.py; on a thread. A node that has just come is given a moment to be measured."""
        asyncio.run_coroutine_threadsafe(self._follower.wait_linked(LINK_SECONDS), loop).result()
        return self._traffic.place(self._measured(), capacities, layers, epoch, previous)

    def _measured(self) -> dict[NodeName, Measured]:
        row = 4 * self.manifest.layers[0].spec.hidden_size  # 16 bits a number, there and back
        nodes = self._membership.state.nodes
        return {name: measured(node, self.dispatcher.link(name), row) for name, node in nodes.items()}

    def _node_status(self, name: NodeName) -> NodeStatus:
        return node_status(
            self._membership.state,
            name,
            self._local if name == LOCAL else None,
            self.dispatcher.counters.get(name, NodeCounters()),
            self.dispatcher.link(name),
            load_bytes_per_s=self._server.rates.rate(name),
            source_fault=self._server.sources.fault(name),
        )


def _known_hashes(checkpoint: ModelSource) -> Callable[[ExpertId], bytes | None]:
    """A pack knows what its experts hash to; of other models it is computed when they are read."""
    return checkpoint.expert_digest if isinstance(checkpoint, PackCheckpoint) else lambda _: None
