"""What a link's bytes cost, as its own traffic shows, and whether they should be fewer."""

import ctypes
from ipaddress import ip_address

from .native import library

LARGE_BYTES = 128 << 10  # from here a message's time is the bytes'; also in cpp/speeds.h
SAMPLES = 16  # as there
FORGIVEN = 0.9


def is_loopback(address: str) -> bool:
    """Whether `address`, host:port, names this machine's loopback interface."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, or an address of another kind
        return False


class LinkSpeed(ctypes.Structure):
    """Round trip and seconds a byte, both measured; LinkSpeed of cpp/speeds.h, field for field.

    Of the last SAMPLES of each kind the best counts, for a busy machine only makes them worse.
    """

    _fields_ = (
        *((name, ctypes.c_double) for name in ("round_trip_s", "late_s", "s_per_byte")),
        *((name, ctypes.c_int32) for name in ("slow", "loopback")),
        ("usual_s", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("round_trips_seen", "rates_seen")),
        *((name, ctypes.c_double * SAMPLES) for name in ("round_trips", "rates")),
    )

    round_trip_s: float  # 0 before the first
    # How much longer than the best a message of one token or some takes of late. A machine that is busy with
    # something else is slow to look at what it gets, whatever its arithmetic takes.
    late_s: float
    s_per_byte: float  # 0 before the first, as if bytes cost nothing
    slow: int  # whether bytes are what large messages on it wait for
    loopback: int
    usual_s: float

    def __init__(self, *, loopback: bool) -> None:
        """`loopback`: the other end is on this machine, and a busy processor must not be taken for a slow line."""
        super().__init__(loopback=loopback)

    def forgive(self) -> None:
        """Called now and then: a node that was late is not asked any more, and would stay late for ever."""
        self.usual_s *= FORGIVEN
        self.late_s = max(0.0, self.usual_s - self.round_trip_s)

    def note(self, largest: int, total: int, seconds: float) -> None:
        """An exchange whose messages had `largest` and `total` bytes, the node's arithmetic left out."""
        library().moehive_note_link(ctypes.addressof(self), largest, total, seconds)

    def eight_bit(self, nbytes: int) -> bool:
        """Whether hidden states of `nbytes` should travel in 8 bits: the link is slow and bytes are its time."""
        return bool(self.slow) and nbytes * self.s_per_byte > self.round_trip_s / 4
