"""The coordinator's network card, which its links share: large messages to several nodes leave one after the other.

Sent all at once, they share the card, and all nodes have theirs only when the last byte has left: each then computes
while the card is idle, and all answer at once. One after the other, the first node computes and answers while the
next ones are sent theirs.
"""

from .speed import LARGE_BYTES, LinkSpeed

SURE = 0.9  # of the time that a message's bytes should take: the next one is there when the last of them leave


class Card:
    """Whose turn it is, by the time that bytes take on slow links: nobody waits for a node that is gone."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def turn(self, speed: LinkSpeed, nbytes: int, now: float) -> float:
        """How many seconds from `now` on, of any clock, a message on a link of that speed should be held back."""
        if not speed.slow or nbytes < LARGE_BYTES:
            return 0.0
        begins = max(now, self._free_at)
        self._free_at = begins + SURE * speed.s_per_byte * nbytes
        return begins - now
