"""The node's side of the control stream: it reports, the coordinator directs; reconnects for ever.

The coordinator may vanish and return at any time. Experts held and a fetch in hand survive that; a coordinator that
returns assigns again, and what is there already is reported ready at once.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

import grpc
import grpc.aio
import psutil

from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import MAX_SENTENCE, BoundsError, check_directive
from moehive.proto.handshake import metadata
from moehive.proto.timing import HEARTBEAT_SECONDS, RELEASE_SECONDS

from .backoff import Backoff
from .executor import Totals
from .fetch import Assignment, SliceError, SliceLoader
from .identity import NodeIdentity
from .store import ExpertStore
from .types import NodeError
from .uplink import Uplink

log = logging.getLogger(__name__)

RETRY_SLICE_SECONDS = 30.0  # after a slice that could not be had, for example for a full disk
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

Call: TypeAlias = grpc.aio.StreamStreamCall[pb.NodeReport, pb.Directive]


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
        self.attending = False
        self.released = asyncio.Event()
        self._identity = identity
        self._uplink = uplink
        self._hello = hello
        self._store = store
        self._loader = loader
        self._totals = totals
        self._changed = changed
        self._process = psutil.Process()
        self._call: Call | None = None
        self._writing = asyncio.Lock()  # gRPC takes one write at a time
        self._assigned: Assignment | None = None
        self._ready = True  # holds all that is assigned
        self._loading: asyncio.Task[None] | None = None
        self._progress: tuple[int, int] | None = None  # bytes done, bytes in all, of the load in hand

    @property
    def ready(self) -> bool:
        """Whether the coordinator is attended and all that it assigned is held."""
        return self.attending and self._ready

    @property
    def state(self) -> str:
        """One line for `systemctl status`."""
        held = f"{self._store.experts_held} experts, {self._store.bytes_held / 1e9:.2f} GB"
        if not self.attending:
            return f"Waiting for the coordinator at {self._identity.cluster_address}; holding {held}."
        if not self._ready:
            done, total = self._progress or (0, 0)
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
                except (BoundsError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
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
            await self._stop_loading()

    async def leave(self) -> None:
        """Asks to be released and waits for it, RELEASE_SECONDS at most; at once when the coordinator is away."""
        if not self.attending:
            return
        await self._report(pb.NodeReport(leaving=pb.Leaving()))
        with suppress(TimeoutError):
            await asyncio.wait_for(self.released.wait(), RELEASE_SECONDS)

    async def _attend(self) -> None:
        """One control stream, from hello to its end."""
        call = self._uplink.stub().Attend(metadata=metadata())
        self._call = call
        tasks: list[asyncio.Task[None]] = []
        try:
            await call.write(pb.NodeReport(hello=self._hello))
            tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._renew())]
            while (directive := await call.read()) is not grpc.aio.EOF:
                check_directive(directive)
                self._set_attending(True)
                await self._follow(directive)
                if self.released.is_set():
                    return
            # The status of a stream that the other side refused is an error; that of one it closed is not.
            if await call.code() is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    await call.code(),
                    await call.initial_metadata(),
                    await call.trailing_metadata(),
                    await call.details(),
                )
        finally:
            self._call = None
            for task in tasks:
                task.cancel()
            call.cancel()

    async def _follow(self, directive: pb.Directive) -> None:
        kind = directive.WhichOneof("directive")
        if kind == "assign":
            await self._assign(directive.assign)
        elif kind == "commit":
            self._commit(directive.commit.epoch)
        elif kind == "release":
            log.info("The coordinator has released this node.")
            self.released.set()

    async def _assign(self, message: pb.AssignSlice) -> None:
        try:
            wanted = await asyncio.to_thread(Assignment.read, message)
        except SliceError as error:
            await self._failed(message.epoch, str(error))
            return
        if self._loading is not None and not self._loading.done() and wanted == self._assigned:
            return  # a coordinator that came back; the load in hand goes on
        await self._stop_loading()
        self._assigned = wanted
        self._ready = False
        self._progress = None
        self._changed()
        self._loading = asyncio.create_task(self._load(wanted))

    async def _load(self, wanted: Assignment) -> None:
        """Loads until it is done, however often it has to begin again."""
        log.info("Epoch %d: %d experts of %s are assigned.", wanted.epoch, len(wanted.experts), wanted.manifest.name)
        while True:
            try:
                await self._loader.load(wanted, self._note)
                break
            except NodeError as error:
                log.error("Epoch %d: %s Trying again in %.0f s.", wanted.epoch, error, RETRY_SLICE_SECONDS)
                await self._failed(wanted.epoch, str(error))
            await asyncio.sleep(RETRY_SLICE_SECONDS)
        log.info("Epoch %d: ready, %d experts held.", wanted.epoch, self._store.experts_held)
        self._ready = True
        self._progress = None
        await self._report(pb.NodeReport(ready=pb.SliceReady(epoch=wanted.epoch)))
        self._changed()

    def _note(self, done: int, total: int) -> None:
        self._progress = (done, total)

    def _commit(self, epoch: int) -> None:
        wanted = self._assigned
        if wanted is None or wanted.epoch != epoch:
            return  # it changes nothing for this node, or a newer assignment is on its way
        dropped = self._store.retain(frozenset(wanted.experts))
        if dropped:
            log.info("Epoch %d: %d experts that it does not use were dropped.", epoch, dropped)

    async def _stop_loading(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])
            self._loading = None

    async def _failed(self, epoch: int, sentence: str) -> None:
        await self._report(pb.NodeReport(failed=pb.SliceFailed(epoch=epoch, sentence=sentence[:MAX_SENTENCE])))

    async def _report(self, report: pb.NodeReport) -> None:
        """Says it if anybody listens; the end of the stream is noticed by its reader."""
        async with self._writing:
            if self._call is not None:
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                    await self._call.write(report)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self._set_attending(True)  # not refused for so long
            await self._report(pb.NodeReport(heartbeat=self._heartbeat()))
            if self._progress is not None and self._assigned is not None:
                done, total = self._progress
                progress = pb.SliceProgress(epoch=self._assigned.epoch, bytes_done=done, bytes_total=total)
                await self._report(pb.NodeReport(progress=progress))
                self._changed()

    def _heartbeat(self) -> pb.Heartbeat:
        return pb.Heartbeat(
            experts_held=self._store.experts_held,
            bytes_held=self._store.bytes_held,
            calls=self._totals.calls,
            expert_calls=self._totals.expert_calls,
            compute_ns=self._totals.compute_ns,
            resident_bytes=self._process.memory_info().rss,
            load=os.getloadavg()[0],
        )

    async def _renew(self) -> None:
        while True:
            try:
                await self._identity.renew_if_due(self._uplink.stub())
            except grpc.aio.AioRpcError as error:
                log.warning("The certificate could not be renewed: %s", error.details())
            except NodeError as error:
                log.warning("The certificate could not be renewed: %s", error)
            await asyncio.sleep(RENEWAL_CHECK_SECONDS)

    def _set_attending(self, attending: bool) -> None:
        if attending != self.attending:
            self.attending = attending
            if attending:
                log.info("Attended by the coordinator at %s.", self._identity.cluster_address)
            self._changed()
