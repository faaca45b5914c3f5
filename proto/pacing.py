"""Copies in the background take a bounded share of a sender's link while it has requests to answer."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from ipaddress import ip_address
from time import monotonic
from typing import TypeVar

T = TypeVar("T")

SHARE = 0.25  # of the link's time
# The same to a receiver on this machine. There is no link to wait for, but both ends take its processors, the
# receiver for twice as long as the sender, and several pairs do so at once: with a quarter, steps took twice their
# time; with 0.08 the slowest in a hundred did so still (docs/faults.md).
NEAR_SHARE = 0.03
LONGEST_REST = 5.0  # seconds; whoever waits for the next chunk must not take the sender for dead
FIRST_SECONDS = 0.002  # that sending a chunk is taken to need before any was sent: 512 KiB at 2 Gbit/s
WEIGHT = 1 / 8  # of the newest chunk in the mean
# Between the begins of two loads: connections, handshakes and first chunks are some 50 ms of work on several
# machines; two begins within one step are one slow step.
BEGIN_SECONDS = 0.3


class Pace:
    """Bounds all streams of one sender together.

    The link is measured by the sending itself: a stream that gRPC's flow control holds back for a second has kept the
    link busy for a second. Rests follow the mean of the last chunks, since what one of them took says as much about
    what else the machine did. A stream begins with a rest, so that those that are asked for at once, as when a plan
    changes, begin one after the other.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        """`busy` says whether requests are being answered now; while none are, copies go as fast as they can."""
        self._busy = busy
        self._turn = asyncio.Lock()
        self._beginning = asyncio.Lock()
        self._mean = {SHARE: FIRST_SECONDS, NEAR_SHARE: FIRST_SECONDS}  # seconds that a chunk takes

    async def begin(self) -> None:
        """Returns at once; while requests are being answered, one caller after the other, at intervals."""
        if self._busy():
            async with self._beginning:
                await asyncio.sleep(BEGIN_SECONDS)

    async def chunks(self, source: AsyncGenerator[T], receiver: str) -> AsyncIterator[T]:
        """What `source` gives, after a rest, and with rests in between that make up for the time that sending took.

        `receiver`: its IP address.
        """
        share = NEAR_SHARE if receiver and ip_address(receiver).is_loopback else SHARE
        async with aclosing(source):
            await self._rest(share)
            async for chunk in source:
                start = monotonic()
                yield chunk
                took = min(monotonic() - start, LONGEST_REST * share)
                self._mean[share] += WEIGHT * (took - self._mean[share])
                await self._rest(share)

    async def _rest(self, share: float) -> None:
        if self._busy():
            async with self._turn:  # the rests of several streams come one after the other
                await asyncio.sleep(self._mean[share] / share)
