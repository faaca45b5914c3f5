"""What a link's bytes cost, as its own traffic shows, and whether they should be fewer."""

from collections import deque
from ipaddress import ip_address

SMALL_BYTES = 16 << 10  # up to here a message's time is the round trip's
LARGE_BYTES = 128 << 10  # from here it is the bytes'
SAMPLES = 16  # the last ones of each kind; the best counts, for a busy machine only makes them worse
NEWEST = 0.125  # weight of an exchange among those before it, in what is usual
FORGIVEN = 0.9
# Rounding an f32 row to 8 bits and back, at both ends, costs some 2 ns a byte and saves three quarters of the bytes.
SLOW_S_PER_BYTE = 5e-9  # from 1.6 Gbit/s down 8 bits pay
FAST_S_PER_BYTE = 3e-9  # from 2.7 Gbit/s up they do not; in between it stays as it was


def is_loopback(address: str) -> bool:
    """Whether `address`, host:port, names this machine's loopback interface."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, or an address of another kind
        return False


class LinkSpeed:
    """Round trip and seconds a byte, both measured."""

    def __init__(self, *, loopback: bool) -> None:
        """`loopback`: the other end is on this machine, and a busy processor must not be taken for a slow line."""
        self._loopback = loopback
        # Plain values: each layer's choice among replicas reads them of each link.
        self.round_trip_s = 0.0  # the best of late; 0 before the first
        # How much longer than the best a message of one token or some takes of late. A machine that is busy with
        # something else is slow to look at what it gets, whatever its arithmetic takes.
        self.late_s = 0.0
        self._round_trips: deque[float] = deque(maxlen=SAMPLES)
        self._per_byte: deque[float] = deque(maxlen=SAMPLES)
        self._usual = 0.0
        self._slow = False

    @property
    def s_per_byte(self) -> float:
        """The best of late, seconds; 0 before the first, as if bytes cost nothing."""
        return min(self._per_byte, default=0.0)

    def forgive(self) -> None:
        """Called now and then: a node that was late is not asked any more, and would stay late for ever."""
        self._usual *= FORGIVEN
        self.late_s = max(0.0, self._usual - self.round_trip_s)

    @property
    def slow(self) -> bool:
        """Whether bytes are what large messages on it wait for."""
        return self._slow and not self._loopback

    def note(self, largest: int, total: int, seconds: float) -> None:
        """An exchange whose messages had `largest` and `total` bytes, the node's arithmetic left out."""
        if largest < LARGE_BYTES:
            self._usual = self._usual + NEWEST * (seconds - self._usual) if self._usual else seconds
        if largest <= SMALL_BYTES:
            self._round_trips.append(seconds)
            self.round_trip_s = min(self._round_trips)
        elif largest >= LARGE_BYTES:
            self._per_byte.append(max(seconds - self.round_trip_s, 0.0) / total)
            self._slow = self.s_per_byte > (FAST_S_PER_BYTE if self._slow else SLOW_S_PER_BYTE)
        self.late_s = max(0.0, self._usual - self.round_trip_s)

    def eight_bit(self, nbytes: int) -> bool:
        """Whether hidden states of `nbytes` should travel in 8 bits: the link is slow and bytes are its time."""
        return self.slow and nbytes * self.s_per_byte > self.round_trip_s / 4
