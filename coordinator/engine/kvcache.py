"""The memory bound over all sequences' caches: an account of bytes, reserved before a sequence starts.

Each sequence's cache is the trunk's own object; this counts what the sequences may grow to, so that the bound
holds at the worst moment and no running sequence has to be thrown out.
"""

from ..types import NoRoom


def readable(nbytes: int) -> str:
    """`nbytes` for a person, for example `1.5 GB`."""
    value = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


class KVBudget:
    """Bytes reserved by owner, never more than `limit_bytes` together."""

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes <= 0:
            raise ValueError(f"The KV cache needs a bound above 0 bytes, not {limit_bytes}.")
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._reserved: dict[str, int] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody has reserved."""
        return self.limit_bytes - self.used_bytes

    @property
    def owners(self) -> int:
        """How many hold a reservation."""
        return len(self._reserved)

    def check_fits_alone(self, nbytes: int) -> None:
        """Raises NoRoom when `nbytes` would not fit even with nothing else running."""
        if nbytes > self.limit_bytes:
            raise NoRoom(
                f"This generation needs {readable(nbytes)} of KV cache and the coordinator's bound is "
                f"{readable(self.limit_bytes)}; shorten the prompt or ask for fewer tokens."
            )

    def reserve(self, owner: str, nbytes: int) -> bool:
        """Makes `owner`'s reservation, new or not, `nbytes` in all; False, and no change, without room."""
        more = nbytes - self._reserved.get(owner, 0)
        if more > self.free_bytes:
            return False
        self._reserved[owner] = nbytes
        self.used_bytes += more
        return True

    def release(self, owner: str) -> None:
        """Gives back what `owner` reserved. Raises KeyError when it holds nothing."""
        self.used_bytes -= self._reserved.pop(owner)

    def check_integrity(self) -> None:
        """For tests: raises AssertionError when the account does not add up."""
        assert self.used_bytes == sum(self._reserved.values()), "used bytes differ from the reservations"
        assert 0 <= self.used_bytes <= self.limit_bytes, "more is reserved than there is"
        assert all(nbytes >= 0 for nbytes in self._reserved.values()), "a negative reservation"
