"""Which slices this node was told to hold, and the one task that loads them in order.

At most two are alive: the one that the coordinator dispatches by and the newest one, which is to follow it. What
neither needs is dropped when the newest is committed, or earlier if a load has no room otherwise.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from moehive.kernels.geometry import ExpertId

from .fetch import Assignment, SliceLoader
from .store import ExpertStore
from .types import NodeError

log = logging.getLogger(__name__)

Report = Callable[[int, NodeError | None], Awaitable[None]]  # epoch; None: all of its slice is held


class Slices:
    """`report` is awaited once for each slice that was loaded or failed; a failed one waits to be assigned again."""

    def __init__(self, store: ExpertStore, loader: SliceLoader, report: Report) -> None:
        self.progress: tuple[int, int, int] | None = None  # epoch, bytes done, bytes in all, of the load in hand
        self._store = store
        self._loader = loader
        self._report = report
        self._active: Assignment | None = None
        self._newest: Assignment | None = None
        self._todo: list[Assignment] = []
        self._unready: set[int] = set()  # epochs assigned and not loaded
        self._loading: Assignment | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """Whether all that is assigned is held."""
        return not any(a.epoch in self._unready for a in (self._active, self._newest) if a is not None)

    def forget(self) -> None:
        """A control stream begins: the coordinator assigns anew. Experts held and a load in hand stay."""
        self._active = self._newest = None
        self._todo.clear()
        self._unready.clear()

    async def assign(self, wanted: Assignment) -> None:
        """Begins to load a slice, after that which is being loaded if it is still needed."""
        if self._active is None or self._active.epoch == wanted.epoch:
            self._active = wanted
        else:
            self._newest = wanted
        self._unready.add(wanted.epoch)
        alive = [a for a in (self._active, self._newest) if a is not None]
        self._todo = [a for a in self._todo if a in alive and a.epoch != wanted.epoch]
        if self._loading == wanted:
            return
        self._todo.append(wanted)
        if self._loading is not None and self._loading not in alive:
            await self.stop()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    def commit(self, epoch: int) -> None:
        """The coordinator dispatches by this epoch: drops what no slice needs any more."""
        if self._newest is not None and self._newest.epoch == epoch:
            self._active, self._newest = self._newest, None
        if self._active is None or self._active.epoch != epoch:
            return
        dropped = self._store.retain(self._needed())
        if dropped:
            log.info("Epoch %d: %d experts that it does not use were dropped.", epoch, dropped)

    async def stop(self) -> None:
        """Breaks off the load in hand; what it has loaded stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    def _needed(self) -> frozenset[ExpertId]:
        return frozenset(e for a in (self._active, self._newest) if a is not None for e in a.experts)

    async def _work(self) -> None:
        while self._todo:
            wanted = self._loading = self._todo.pop(0)
            experts, name = len(wanted.experts), wanted.manifest.name
            log.info("Epoch %d: %d experts of %s are assigned.", wanted.epoch, experts, name)
            problem: NodeError | None = None
            try:
                await self._loader.load(wanted, self._needed(), self._note)
                self._store.pin(wanted.in_ram, wanted.in_vram)
                await asyncio.to_thread(self._store.prepare)
                self._unready.discard(wanted.epoch)
                log.info("Epoch %d: ready, %d experts held.", wanted.epoch, self._store.experts_held)
            except NodeError as error:
                log.error("Epoch %d: %s", wanted.epoch, error)
                problem = error
            finally:
                self._loading = self.progress = None
            await self._report(wanted.epoch, problem)

    def _note(self, done: int, total: int) -> None:
        assert self._loading is not None
        self.progress = (self._loading.epoch, done, total)
