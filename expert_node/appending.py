"""An expert's bytes go to the disk in a thread while more of them arrive."""

import asyncio
from collections import deque

from moehive.proto.chunks import Chunk, chunk_data

from .cache import PartFile
from .concurrency import in_thread

MOST_WAITING = 3  # chunks that have arrived while the thread writes; then the sender waits


class Appending:
    """Appends chunks to one part in the order of `add`; use it on one event loop, and `stop` it at the end."""

    def __init__(self, part: PartFile) -> None:
        self._part = part
        self._waiting: deque[Chunk] = deque()
        self._work: asyncio.Task[None] | None = None
        self._stopped = False

    async def add(self, chunk: Chunk) -> None:
        """Takes the next chunk. Raises BoundsError and CacheError for it or an earlier one."""
        self._waiting.append(chunk)
        if self._work is None or self._work.done() or len(self._waiting) == MOST_WAITING:
            await self._turn()

    async def finish(self) -> None:
        """Returns once file and hash have all that was added, and closes it. Raises BoundsError and CacheError."""
        while self._work is not None or self._waiting:
            await self._turn()
        await in_thread(self._part.close)  # the file system has work of a millisecond left

    async def stop(self) -> None:
        """Returns once no thread writes; what still waits is forgotten."""
        self._stopped = True
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work])

    async def _turn(self) -> None:
        """Has the thread begin anew, for what it has not seen before it ended."""
        if self._work is not None:
            work, self._work = self._work, None
            await work
        if self._waiting:
            self._work = asyncio.create_task(in_thread(self._write))

    def _write(self) -> None:
        while self._waiting and not self._stopped:
            self._part.append(chunk_data(self._waiting.popleft()))
