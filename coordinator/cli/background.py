"""A local cluster on an event loop of its own thread, so that the main thread may wait for a person."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from moehive.proto.ending import end_soon, ended
from moehive.proto.malloc import settle_heap

if TYPE_CHECKING:
    from ..local_cluster import LocalCluster

STOP_SECONDS = 5.0  # for a cluster to end; its nodes end with this process in any case


@contextmanager
def running_cluster(model: str, base: Path, nodes: int, grpc_port: int, http_port: int) -> "Iterator[LocalCluster]":
    """A cluster that answers requests, in the folder `base` or one beside it; ended when the block is left.

    SIGTERM ends the block like Ctrl-C, as KeyboardInterrupt. Raises CoordinatorError or OSError, one sentence.
    """
    import uvloop

    from ..local_cluster import LocalCluster, own_folder
    from .loading import wait_started

    signal.signal(signal.SIGTERM, _terminate)
    with own_folder(base) as folder:
        loop = uvloop.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="cluster", daemon=True)
        thread.start()

        async def make() -> LocalCluster:
            return LocalCluster(model, folder, nodes, grpc_port=grpc_port, http_port=http_port)

        cluster = asyncio.run_coroutine_threadsafe(make(), loop).result()
        try:
            starting = asyncio.run_coroutine_threadsafe(cluster.start(), loop)
            try:
                wait_started(starting, cluster)
            except BaseException:  # Ctrl-C while it starts
                starting.cancel()
                raise
            settle_heap()
            yield cluster
        finally:
            end_soon()
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(cluster.stop(), loop).result(STOP_SECONDS)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(1.0)
            ended()


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # the same way out as Ctrl-C
