"""Copies in the background take a bounded share of a sender's link while it has requests to answer."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from time import monotonic
from typing import TypeVar

T = TypeVar("T")

SHARE = 0.25  # of the link's time
LONGEST_REST = 5.0  # seconds; whoever waits for the next chunk must not take the sender for dead


class Pace:
    """Bounds all streams of one sender together.

    The link is measured by the sending itself: a stream that gRPC's flow control holds back for a second has kept the
    link busy for a second.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        """`busy` says whether requests are being answered now; while none are, copies go as fast as they can."""
        self._busy = busy
        self._turn = asyncio.Lock()

    async def chunks(self, source: AsyncGenerator[T]) -> AsyncIterator[T]:
        """What `source` gives, with rests in between that make up for the time that sending took."""
        async with aclosing(source):
            async for chunk in source:
                start = monotonic()
                yield chunk
                took = monotonic() - start
                if self._busy():
                    async with self._turn:  # the rests of several streams come one after the other
                        await asyncio.sleep(min(took / SHARE, LONGEST_REST))
