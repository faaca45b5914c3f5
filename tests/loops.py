"""Event loops of tests: what a test leaves open on one ends with it.

A gRPC server that still serves when its loop is closed can't be stopped any more, and gRPC then waits for its calls
when Python ends: one failing test, and the run would never end.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio
import pytest

SECONDS = 60.0  # that anything on a loop in a thread may take

T = TypeVar("T")


@pytest.fixture(scope="session", autouse=True)
def servers_stop_with_their_loop() -> Iterator[None]:
    """Each of gRPC's servers gets a task that stops it when the loop's tasks are cancelled, as asyncio.run does."""
    make = grpc.aio.server

    async def stop_when_cancelled(server: Any) -> None:
        try:
            await asyncio.get_running_loop().create_future()  # never
        finally:
            await server.stop(None)

    def server(*arguments: Any, **options: Any) -> Any:
        made = make(*arguments, **options)
        task = asyncio.get_running_loop().create_task(stop_when_cancelled(made))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return made

    tasks: set[asyncio.Task[None]] = set()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grpc.aio, "server", server)
        yield


@dataclass(frozen=True, slots=True)
class LoopInAThread:
    """A loop on which functions that are no coroutines run some."""

    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What it returns; TimeoutError after SECONDS."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(SECONDS)


@contextmanager
def loop_in_a_thread() -> Iterator[LoopInAThread]:
    """A loop that runs in a thread of its own; at the end its tasks are cancelled."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield LoopInAThread(loop)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
