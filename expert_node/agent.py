"""The node's side of the control stream: it reports, the coordinator directs; reconnects for ever.

The coordinator may vanish and return at any time. Experts held and a fetch in hand survive that; a coordinator that
returns assigns again, and what is there already is reported ready at once.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress

import grpc
import grpc.aio
import psutil
from google.protobuf.message import DecodeError

from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import MAX_SENTENCE, BoundsError, check_directive
from moehive.proto.timing import HEARTBEAT_SECONDS, RELEASE_SECONDS
from moehive.proto.wire.stream import Stream

from .backoff import Backoff
from .download import SliceError
from .executor import Totals
from .fetch import Assignment, SliceLoader
from .identity import NodeIdentity
from .slices import Slices
from .store import ExpertStore
from .types import NodeError
from .uplink import Uplink

log = logging.getLogger(__name__)

REFUSED_SECONDS = 30.0  # between two tries at a coordinator that refuses this node or its version
RENEWAL_CHECK_SECONDS = 3600.0

_REFUSALS = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,  # another version
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class Agent:
    """Attends the coordinator until it is released. `changed` is called when `state` may read differently."""

    def __init__(
        self,
        identity: NodeIdentity,
        uplink: Uplink,
        hello: pb.NodeHello,
        store: ExpertStore,
        loader: SliceLoader,
        totals: Totals,
        changed: Callable[[], None],
    ) -> None:
        self.released = asyncio.Event()
        self._away = asyncio.Event()
        self._away.set()
        self._identity = identity
        self._uplink = uplink
        self._hello = hello
        self._store = store
        self._totals = totals
        self._changed = changed
        self._process = psutil.Process()
        self._stream: Stream | None = None
        self._slices = Slices(store, loader, self._loaded)

    @property
    def attending(self) -> bool:
        """Whether the coordinator is there and has accepted this node."""
        return not self._away.is_set()

    @property
    def ready(self) -> bool:
        """Whether the coordinator is attended and all that it assigned is held."""
        return self.attending and self._slices.held

    @property
    def state(self) -> str:
        """One line for `systemctl status`."""
        held = f"{self._store.experts_held} experts, {self._store.bytes_held / 1e9:.2f} GB"
        if not self.attending:
            return f"Waiting for the coordinator at {self._identity.cluster_address}; holding {held}."
        if not self._slices.held:
            _, done, total = self._slices.progress or (0, 0, 0)
            return f"Loading a slice: {done / 1e9:.2f} of {total / 1e9:.2f} GB."
        return f"Serving {held}."

    async def run(self) -> None:
        """Returns once the coordinator has released this node. Raises NodeError when its certificate has expired."""
        backoff = Backoff(first=0.2, longest=5.0)
        said = ""
        try:
            while not self.released.is_set():
                self._identity.check()
                try:
                    await self._attend()
                    sentence, refused = "it ended the stream", False
                except grpc.aio.AioRpcError as error:
                    sentence, refused = error.details() or error.code().name, error.code() in _REFUSALS
                except (BoundsError, DecodeError) as error:
                    sentence, refused = str(error), False
                if self.attending:
                    backoff.reset()
                    said = ""
                self._set_attending(False)
                if self.released.is_set():
                    break
                if sentence != said:
                    log.warning("Not attended by the coordinator (%s); trying again until it is.", sentence)
                    said = sentence
                await self._uplink.close_old()
                if refused:
                    await asyncio.sleep(REFUSED_SECONDS)
                else:
                    await backoff.wait()
        finally:
            await self._slices.stop()

    async def leave(self) -> None:
        """Asks to be released and waits for it, RELEASE_SECONDS at most; at once when the coordinator is away."""
        if not self.attending:
            return
        await self._report(pb.NodeReport(leaving=pb.Leaving()))
        waits = [asyncio.create_task(event.wait()) for event in (self.released, self._away)]
        await asyncio.wait(waits, timeout=RELEASE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _attend(self) -> None:
        """One control stream, from hello to its end."""
        stream = self._stream = await self._uplink.attend()
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._report(pb.NodeReport(hello=self._hello))
            self._slices.forget()
            tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._renew())]
            while (message := await stream.read()) is not None:
                directive = pb.Directive.FromString(bytes(message))
                check_directive(directive)
                await self._follow(directive)
                self._set_attending(True)
                if self.released.is_set():
                    return
        finally:
            self._stream = None
            for task in tasks:
                task.cancel()
            stream.cancel()

    async def _follow(self, directive: pb.Directive) -> None:
        kind = directive.WhichOneof("directive")
        if kind == "assign":
            await self._assign(directive.assign)
        elif kind == "commit":
            self._slices.commit(directive.commit.epoch)
        elif kind == "release":
            log.info("The coordinator has released this node.")
            self.released.set()

    async def _assign(self, message: pb.AssignSlice) -> None:
        try:
            wanted = await asyncio.to_thread(Assignment.read, message)
        except SliceError as error:
            await self._loaded(message.epoch, error)
            return
        await self._slices.assign(wanted)
        self._changed()

    async def _loaded(self, epoch: int, problem: NodeError | None) -> None:
        if problem is None:
            await self._report(pb.NodeReport(ready=pb.SliceReady(epoch=epoch)))
        else:
            failed = pb.SliceFailed(epoch=epoch, sentence=str(problem)[:MAX_SENTENCE])
            await self._report(pb.NodeReport(failed=failed))
        self._changed()

    async def _report(self, report: pb.NodeReport) -> None:
        """Says it if anybody listens; the end of the stream is noticed by its reader."""
        if self._stream is None:
            return
        self._stream.send((report.SerializeToString(),))
        with suppress(grpc.aio.AioRpcError):
            await self._stream.drain()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self._set_attending(True)  # not refused for so long
            await self._report(pb.NodeReport(heartbeat=self._heartbeat()))
            if self._slices.progress is not None:
                epoch, done, total = self._slices.progress
                progress = pb.SliceProgress(epoch=epoch, bytes_done=done, bytes_total=total)
                await self._report(pb.NodeReport(progress=progress))
                self._changed()

    def _heartbeat(self) -> pb.Heartbeat:
        beat = pb.Heartbeat(
            experts_held=self._store.experts_held,
            bytes_held=self._store.bytes_held,
            calls=self._totals.calls,
            expert_calls=self._totals.expert_calls,
            compute_ns=self._totals.compute_ns,
            resident_bytes=self._process.memory_info().rss,
            load=os.getloadavg()[0],
        )
        tier, gpu = self._store.tier, self._store.gpu
        if gpu is not None:
            beat.tiers.vram_bytes = gpu.bytes_held
            beat.tiers.ram_bytes = self._store.ram_bytes
        if tier is not None:
            beat.tiers.ram_bytes = self._store.ram_bytes
            beat.tiers.disk_bytes = self._store.bytes_held
            beat.tiers.lookups = tier.totals.lookups
            beat.tiers.in_ram = tier.totals.here
            beat.tiers.foreseen = tier.totals.foreseen
            beat.tiers.prefetches = tier.totals.prefetches
            beat.tiers.disk_read_bytes = tier.reader.totals.nbytes
            beat.tiers.disk_bandwidth = tier.reader.bandwidth
        return beat

    async def _renew(self) -> None:
        while True:
            try:
                await self._identity.renew_if_due(self._uplink.renew)
            except grpc.aio.AioRpcError as error:
                log.warning("The certificate could not be renewed: %s", error.details())
            except NodeError as error:
                log.warning("The certificate could not be renewed: %s", error)
            await asyncio.sleep(RENEWAL_CHECK_SECONDS)

    def _set_attending(self, attending: bool) -> None:
        if attending == self.attending:
            return
        if attending:
            self._away.clear()
            log.info("Attended by the coordinator at %s.", self._identity.cluster_address)
        else:
            self._away.set()
        self._changed()
