"""An expert node on a test's own event loop, which starts faster than a process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from moehive.expert_node.node import Node, start
from moehive.expert_node.settings import Settings
from moehive.proto.join_token import parse


def node_here(state: Path, speed: bytes, token: str | None, name: str) -> AbstractAsyncContextManager[Node]:
    """It serves from `state`, with a speed.json of these bytes in it; without a token it has joined before."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    (state / "speed.json").write_bytes(speed)
    word = None if token is None else parse(token)
    return _serving(Settings(state=state, token=word, name=name, memory_bytes=64 << 20, threads=1))


@asynccontextmanager
async def _serving(settings: Settings) -> AsyncIterator[Node]:
    node = await start(settings)
    stopped = asyncio.create_task(asyncio.Event().wait())  # never
    serving = asyncio.create_task(node.serve(stopped))
    try:
        yield node
    finally:
        for task in (serving, stopped):
            task.cancel()
        await asyncio.gather(serving, stopped, return_exceptions=True)
        await node.close()
