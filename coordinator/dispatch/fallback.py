"""The coordinator's own last resort: experts whose holders are all away, read from the checkpoint and computed here.

Bounded: the least used ones make room. It is slow where experts are many (each is read from a disk), and it bridges
the time until a node is back or the others have loaded them, without a token lost.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from time import monotonic

import torch

from moehive.kernels.geometry import ExpertId, Manifest
from moehive.kernels.ops import Reduction
from moehive.proto.tensors import Routing

from ..types import CoordinatorError
from .local import LocalExperts

log = logging.getLogger(__name__)

KEEP_SECONDS = 30.0  # experts stay so long after the nodes hold them again: who failed once may fail again
AHEAD = 4  # experts that are read in one go by `prefetch`; a request that waits for others comes in between


class Fallback:
    """Use it on the event loop's thread. `read` gives an expert's blob and is called in threads."""

    def __init__(
        self, manifest: Manifest, read: Callable[[ExpertId], torch.Tensor], capacity_bytes: int, threads: int
    ) -> None:
        self._manifest = manifest
        self._read = read
        self._capacity = capacity_bytes
        self._local = LocalExperts(manifest, threads)
        self._used: OrderedDict[ExpertId, None] = OrderedDict()  # held, the least recently used first
        self._reading = asyncio.Lock()
        self._prefetching: asyncio.Task[None] | None = None
        self._not_needed: asyncio.TimerHandle | None = None
        self.bytes_read = 0
        self.seconds_read = 0.0

    @property
    def held(self) -> int:
        """Experts in memory."""
        return len(self._used)

    def experts_at_once(self, layer: int) -> int:
        """How many experts of a layer may be held; 0: its memory is less than one."""
        return self._capacity // self._manifest.layers[layer].largest_bytes

    async def compute(self, layer: int, hidden: torch.Tensor, routing: Routing, reduction: Reduction) -> torch.Tensor:
        """As a node would; reads what is missing first. Raises CoordinatorError, OSError or MemoryError."""
        self._needed()
        wanted = [ExpertId(layer, e) for e in dict.fromkeys(routing.experts.tolist())]
        await self._hold(wanted, keep=frozenset(wanted))
        return self._local.compute(layer, hidden, routing, reduction)

    def prefetch(self, experts: Sequence[ExpertId]) -> None:
        """Reads `experts` in the background, the first ones first, as far as there is room."""
        if self._prefetching is not None:
            self._prefetching.cancel()
        if experts:
            self._needed()
        self._prefetching = asyncio.get_running_loop().create_task(self._prefetch(experts)) if experts else None

    def rest(self) -> None:
        """The nodes hold all experts again: frees everything in a while, unless it is needed again."""
        self._not_needed = self._not_needed or asyncio.get_running_loop().call_later(KEEP_SECONDS, self.clear)

    def clear(self) -> None:
        """Frees everything now."""
        self.prefetch(())
        self._used.clear()
        self._local.drop_except(frozenset())

    def _needed(self) -> None:
        if self._not_needed is not None:
            self._not_needed.cancel()
            self._not_needed = None

    async def stop(self) -> None:
        """Ends what goes on in the background."""
        self._needed()
        task, self._prefetching = self._prefetching, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _prefetch(self, experts: Sequence[ExpertId]) -> None:
        left = self._capacity
        fitting: list[ExpertId] = []
        for expert in experts:
            left -= self._manifest.nbytes(expert)
            if left < 0:
                break
            fitting.append(expert)
        keep = frozenset(fitting)
        try:
            for start in range(0, len(fitting), AHEAD):
                await self._hold(fitting[start : start + AHEAD], keep)
        except (CoordinatorError, OSError, MemoryError) as error:
            log.warning("Experts could not be read ahead from the checkpoint: %s", error)

    async def _hold(self, wanted: Iterable[ExpertId], keep: frozenset[ExpertId]) -> None:
        """Returns once `wanted` are held; what is not to be kept makes room, then the least used of the rest."""
        wanted = list(wanted)
        while any(expert not in self._used for expert in wanted):
            async with self._reading:
                missing = [expert for expert in wanted if expert not in self._used]
                self._make_room(sum(self._manifest.nbytes(e) for e in missing), frozenset(wanted), keep)
                start = monotonic()
                await asyncio.to_thread(self._local.hold, missing, self._read)
                self.seconds_read += monotonic() - start
                self.bytes_read += sum(self._manifest.nbytes(expert) for expert in missing)
                # Not all of them when `clear` came in between; those are read again.
                self._used.update((expert, None) for expert in missing if expert in self._local)
        for expert in wanted:
            self._used.move_to_end(expert)

    def _make_room(self, nbytes: int, wanted: frozenset[ExpertId], keep: frozenset[ExpertId]) -> None:
        held = sum(self._manifest.nbytes(expert) for expert in self._used)
        for protected in (wanted | keep, wanted):
            for expert in [e for e in self._used if e not in protected]:
                if held + nbytes <= self._capacity:
                    break
                del self._used[expert]
                held -= self._manifest.nbytes(expert)
        self._local.drop_except(frozenset(self._used) | wanted)
