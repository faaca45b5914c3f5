"""Notices a machine that is gone without a word: silence, then a ping, then silence still."""

import asyncio
from collections.abc import Callable

TICK_SECONDS = 5.0
PING_TICKS, DEAD_TICKS = 2, 4  # without a byte from the other side


class Keepalive:
    """Counts from its making until `stop`. A loop that was held up itself counts that as one tick."""

    def __init__(self, ping: Callable[[], None], dead: Callable[[str], None]) -> None:
        """`dead` is called, once, with a sentence that says why."""
        self.quiet_ticks = 0  # to be set to 0 with each byte from the other side
        self._ping = ping
        self._dead = dead
        self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def stop(self) -> None:
        """Nothing is noticed any more."""
        self._timer.cancel()

    def _tick(self) -> None:
        self.quiet_ticks += 1
        if self.quiet_ticks == DEAD_TICKS:
            self._dead(f"The other side was silent for {DEAD_TICKS * TICK_SECONDS:.0f} s.")
            return
        if self.quiet_ticks == PING_TICKS:
            self._ping()
        self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)
