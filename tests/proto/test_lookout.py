"""A loop is kept awake for as long as recent gaps justify, and never at the expense of others."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from itertools import pairwise
from time import perf_counter
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from moehive.proto import lookout
from moehive.proto.lookout import Lookout, ThisMachine, this_machine

GAP = 0.2e-3
LONG = 10 * lookout.LONGEST_SECONDS


class Watched:
    """A lookout on a clock of its own, which goes on with each look and when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.spared = True
        self.looks: list[float] = []  # seconds of each
        self.on_look: Callable[[], None] = lambda: None
        self.lookout = Lookout(lambda loop: self, lambda: self.now)

    native_at = 7

    def look(self, seconds: float) -> bool:
        if self.spared:
            self.looks.append(seconds)
            self.now += seconds
            self.on_look()
        return self.spared

    def exchange(self, gap: float) -> None:
        """One message is waited for, and comes after so many seconds."""
        self.lookout.expect()
        self.now += gap
        self.lookout.came()

    async def rest(self) -> list[float]:
        """Goes on until nobody looks any more, and returns the looks."""
        while self.lookout._looking:  # noqa: ASYNC110
            await asyncio.sleep(0)
        looks, self.looks = self.looks, []
        return looks


@pytest.mark.parametrize("gap", [0.0, GAP, LONG])
def test_native_code_looks_as_long_as_the_loop_would(gap: float) -> None:
    async def main() -> None:
        watched = Watched()
        assert watched.lookout.patience() == (7, 0)
        watched.lookout.learn(gap)
        wanted = 2 * GAP if gap == GAP else 0.0
        assert watched.lookout.patience() == (7, int(wanted * 1e9))
        watched.lookout.expect(since=watched.now - gap)  # waited for natively until now
        watched.lookout.came()
        assert watched.lookout.patience() == (7, int(wanted * 1e9))
        assert Lookout(lambda loop: None).patience() == (None, 0)

    asyncio.run(main())


def on_loop(test: Callable[[Watched], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test(Watched()))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@on_loop
async def test_a_message_that_does_not_come_is_looked_for_twice_the_last_gap(watched: Watched) -> None:
    watched.exchange(GAP)
    watched.lookout.expect()
    looks = await watched.rest()
    assert sum(looks) == pytest.approx(2 * GAP)
    assert max(looks) <= lookout.TURN_SECONDS


@on_loop
async def test_nothing_is_looked_for_before_a_gap_is_known_or_when_nothing_is_expected(watched: Watched) -> None:
    watched.lookout.expect()
    assert await watched.rest() == []
    watched.lookout.came()
    watched.lookout.came()  # of which nobody knew
    watched.exchange(GAP)
    assert await watched.rest() == []


@on_loop
async def test_looking_ends_with_the_last_message_that_is_expected(watched: Watched) -> None:
    watched.exchange(GAP)
    watched.lookout.expect()
    watched.lookout.expect()
    watched.on_look = watched.lookout.came
    assert len(await watched.rest()) == 2


@on_loop
async def test_nobody_looks_while_others_want_the_processors(watched: Watched) -> None:
    watched.exchange(GAP)
    watched.spared = False
    watched.lookout.expect()
    assert await watched.rest() == []
    watched.lookout.came()
    watched.spared = True
    watched.lookout.expect()
    watched.on_look = lambda: setattr(watched, "spared", False)
    assert len(await watched.rest()) == 1


@on_loop
async def test_whatever_else_the_loop_has_to_do_goes_first(watched: Watched) -> None:
    """A chain of callbacks, each of which takes a while, is not held up by looks in between."""
    done: list[float] = []

    def work(left: int) -> None:
        watched.now += 2 * lookout.AT_ONCE_SECONDS
        done.append(watched.now)
        if left:
            asyncio.get_running_loop().call_soon(work, left - 1)

    watched.exchange(0.9 * lookout.LONGEST_SECONDS)
    watched.lookout.expect()
    asyncio.get_running_loop().call_soon(work, 5)
    looks = await watched.rest()
    assert looks  # once that was done
    assert [after - before for before, after in pairwise(done)] == pytest.approx(5 * [2 * lookout.AT_ONCE_SECONDS])


@given(st.lists(st.floats(0.0, LONG, allow_nan=False)))
def test_a_message_is_never_looked_for_much_longer_than_a_short_gap(gaps: list[float]) -> None:
    async def main() -> None:
        watched = Watched()
        for gap in gaps:
            watched.exchange(gap)
            await watched.rest()
        watched.lookout.expect()
        assert sum(await watched.rest()) <= 1.001 * lookout.LONGEST_SECONDS
        for _ in range(8):  # who is asked now and then looks for nothing
            watched.exchange(LONG)
            await watched.rest()
        watched.lookout.expect()
        assert await watched.rest() == []

    asyncio.run(main())


def test_a_look_ends_when_the_loop_has_something_to_do() -> None:
    """A message, and a call from another thread."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        eyes = this_machine(loop)
        assert isinstance(eyes, ThisMachine)
        eyes._processors = 1 << 20  # others may be at work on this machine
        here, there = socket.socketpair()
        here.setblocking(False)
        with here, there:
            came = loop.create_future()
            loop.add_reader(here, lambda: came.done() or came.set_result(here.recv(1)))
            await asyncio.sleep(0.001)  # it waits for that from now on
            assert eyes.look(0.001)
            assert not came.done()
            start = perf_counter()
            there.send(b"x")
            assert eyes.look(3600.0)
            assert await came == b"x"
            loop.remove_reader(here)
            heard = asyncio.Event()
            thread = threading.Thread(target=loop.call_soon_threadsafe, args=(heard.set,))
            thread.start()
            thread.join()
            assert eyes.look(3600.0)
            await heard.wait()
            assert perf_counter() - start < 3600.0

    uvloop.run(main())


def test_a_machine_with_work_for_all_has_no_processor_to_spare() -> None:
    here, there = socket.socketpair()
    eyes = ThisMachine(here.fileno())  # there is never anything to read
    with here, there, ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        while eyes.look(0.001):  # until they have begun
            pass


def test_other_loops_sleep() -> None:
    async def main() -> None:
        assert this_machine(asyncio.get_running_loop()) is None
        sleepless = Lookout()
        for _ in range(3):
            sleepless.expect()
            sleepless.came()
        await asyncio.sleep(0)
        assert not sleepless._looking

    asyncio.run(main())
