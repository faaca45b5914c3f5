"""A TCP proxy before a node's door that loses what passes, both ways or one way, or lets it crawl.

A cut is as when packets are dropped: connections stay, nothing arrives, and what was under way arrives after it.
"""

import asyncio
from contextlib import suppress

PIECE_BYTES = 64 << 10
CRAWL_SECONDS = 0.15  # each piece is late by so much


class Door:
    """After `open`, `set` may be called at any time, until `close`."""

    def __init__(self, port: int, target: int) -> None:
        """Listens on `port` of the loopback interface, for the node that listens on `target`."""
        self._port = port
        self._target = target
        self._cut: set[str] = set()
        self._crawls = False
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listens. Raises OSError."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)

    async def close(self) -> None:
        """Ends every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def set(self, *cut: str, crawls: bool = False) -> None:
        """`cut` names the directions that lose everything, of "to" and "from" the node."""
        self._cut, self._crawls = set(cut), crawls
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        for flow in ((reader, back, "to"), (there, writer, "from")):
            task = asyncio.create_task(self._pass(*flow))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        try:
            while data := await reader.read(PIECE_BYTES):
                while direction in self._cut:
                    await self._changed.wait()
                if self._crawls:
                    await asyncio.sleep(CRAWL_SECONDS)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()
