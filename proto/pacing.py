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
# receiver for twice as long as the sender: with a quarter, steps took twice their time.
NEAR_SHARE = 0.08
LONGEST_REST = 5.0  # seconds; whoever waits for the next chunk must not take the sender for dead
# Taken for what a stream's first chunk needs, seconds: 512 KiB at 1 Gbit/s. Streams that are asked for at once, as
# when a plan changes, begin one after the other, each after its first rest.
FIRST_SECONDS = 0.004
# Between the begins of two loads: connections, handshakes and questions are some 25 ms of work on several machines.
BEGIN_SECONDS = 0.05


class Pace:
    """Bounds all streams of one sender together.

    The link is measured by the sending itself: a stream that gRPC's flow control holds back for a second has kept the
    link busy for a second.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        """`busy` says whether requests are being answered now; while none are, copies go as fast as they can."""
        self._busy = busy
        self._turn = asyncio.Lock()
        self._beginning = asyncio.Lock()

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
            await self._rest(FIRST_SECONDS / share)
            async for chunk in source:
                start = monotonic()
                yield chunk
                await self._rest((monotonic() - start) / share)

    async def _rest(self, seconds: float) -> None:
        if self._busy():
            async with self._turn:  # the rests of several streams come one after the other
                await asyncio.sleep(min(seconds, LONGEST_REST))
