"""Keeps an event loop awake while a message is near.

A thread that sleeps until a message comes is woken late when its processor sleeps as well: 10 to 100 µs. A layer of
decoding would pay that twice, at the node and at the coordinator. So for as long as recent gaps justify, the loop's
thread looks again and again whether something has come, as the idle threads of the kernels' pool do for their next
job (kernels/cpu/pool.cc).

It takes nothing from others: it looks only while the machine has another processor that nobody wants, without
Python's lock, and when the loop has nothing else to do. Where nobody asks for anything it does not look at all.
"""

import asyncio
import ctypes
import os
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

from .native import library

LONGEST_SECONDS = 2e-3  # beyond it, being awake costs more of a processor than being late costs a layer
SHORTEST_SECONDS = 20e-6  # less is over before it has begun
TURN_SECONDS = 50e-6  # of looking at a time: then the loop has its timers
AT_ONCE_SECONDS = 15e-6  # a loop that comes back later had something else to do, and may have more


class NativeEyes(ctypes.Structure):
    """What native code that waits looks with: Eyes of cpp/inlet.h, field for field."""

    _fields_ = (
        ("look", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("descriptor", "load")),
        ("processors", ctypes.c_int64),
    )


class Eyes(Protocol):
    """What a lookout looks with."""

    native_at: int  # the address of a NativeEyes

    def look(self, seconds: float) -> bool:
        """Returns when the loop has something to do, after `seconds` at the latest.

        False, at once, when no other processor is left.
        """


class ThisMachine:
    """Linux, whose kernel says how many threads want a processor. The native part looks, without Python's lock."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` can be read when the loop has something to do. Raises OSError: the kernel does not say."""
        self._descriptor = descriptor
        self._look = library().moehive_look
        # As kernels/machine.py's cores(), which this part may not import: those that this process may use. Where the
        # machine has more, it is the more careful.
        self._processors = len(os.sched_getaffinity(0))
        self._load = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._load)
        where = ctypes.cast(self._look, ctypes.c_void_p).value
        self._native = NativeEyes(where, descriptor, self._load, self._processors)
        self.native_at = ctypes.addressof(self._native)

    def look(self, seconds: float) -> bool:
        """See Eyes."""
        return bool(self._look(self._descriptor, self._load, self._processors, int(seconds * 1e9)))


def this_machine(loop: asyncio.AbstractEventLoop) -> Eyes | None:
    """For a loop of uvloop's on Linux; None for others, which then sleep."""
    descriptor = getattr(loop, "_get_backend_id", None)
    if descriptor is None or not hasattr(os, "sched_getaffinity"):
        return None
    try:
        return ThisMachine(descriptor())
    except OSError:
        return None


class Lookout:
    """For the messages that one end of a hop waits for. Use it on one event loop."""

    def __init__(
        self,
        eyes: Callable[[asyncio.AbstractEventLoop], Eyes | None] = this_machine,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """`eyes` of a loop; `clock` in seconds."""
        self._make_eyes = eyes
        self._clock = clock
        self._eyes: Eyes | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.expected = 0  # messages
        self._since = 0.0  # when one was expected, or came, the last time
        self._watch = 0.0  # seconds from then on
        self._looking = False
        self._looked_at = 0.0  # the end of the last look

    def expect(self, since: float | None = None) -> None:
        """One more message will come; it is waited for since then, if not from now on."""
        self.expected += 1
        self._since = self._clock() if since is None else since
        if self._looking or self._watch < SHORTEST_SECONDS:
            return
        if self._find_eyes() is not None:
            assert self._loop is not None
            self._looking = True
            self._loop.call_soon(self._look)

    def patience(self) -> tuple[int | None, int]:
        """With what native code may wait for a message: see Taker.patience."""
        eyes = self._find_eyes()
        if eyes is None:
            return None, 0
        return eyes.native_at, int(self._watch * 1e9) if self._watch >= SHORTEST_SECONDS else 0

    def _find_eyes(self) -> Eyes | None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._eyes = self._make_eyes(self._loop)
        return self._eyes

    def came(self) -> None:
        """A message came, or never will. Does nothing when none was expected."""
        if self.expected == 0:
            return
        self.expected -= 1
        now = self._clock()
        gap, self._since = now - self._since, now
        self.learn(gap)

    def learn(self, gap: float) -> None:
        """A message was waited for for so many seconds."""
        # As in the pool: the layers of a step follow each other quickly, the next step and the next request do not.
        if gap <= LONGEST_SECONDS:
            self._watch = max(self._watch, min(2 * gap, LONGEST_SECONDS))
        else:
            self._watch /= 2

    def _look(self) -> None:
        assert self._loop is not None and self._eyes is not None
        now = self._clock()
        left = self._since + self._watch - now
        if self.expected == 0 or left <= 0.0:
            self._looking = False
            return
        if now - self._looked_at <= AT_ONCE_SECONDS:
            if not self._eyes.look(min(left, TURN_SECONDS)):
                self._looking = False
                return
            now = self._clock()
        self._looked_at = now
        self._loop.call_soon(self._look)
