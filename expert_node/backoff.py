"""Waiting longer after each failure, with some chance in it so that nodes do not all come back at once."""

import asyncio
import random


class Backoff:
    """Seconds from `first`, doubled at each wait, up to `longest`."""

    def __init__(self, first: float, longest: float) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def reset(self) -> None:
        """After a success: the next wait is short again."""
        self._next = self._first

    async def wait(self) -> None:
        """Sleeps between half of the present wait and all of it."""
        seconds = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, self._longest)
        await asyncio.sleep(seconds)
