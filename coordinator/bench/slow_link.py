"""A made-up network on loopback: TCP proxies that delay and limit what passes, as cables between hosts would.

Each host has one network card: what it sends to all others shares its rate, and so does what it receives. One
process carries all cables, in one native thread (cpp/network.h) that sleeps until the next piece is due.
"""

import ctypes
import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from moehive.kernels.library import load

from ..types import CoordinatorError
from .peers import Peer

_ABI = 1


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """A network card and its cable: seconds one way, bits a second in each direction."""

    delay_s: float
    bits_per_s: float

    def __str__(self) -> str:
        return f"{self.delay_s * 1e3:g} ms, {self.bits_per_s / 1e9:g} Gbit/s"


@dataclass(frozen=True, slots=True)
class Cable:
    """Connections from host `source` to `port` on this machine, where host `target` listens."""

    source: str
    target: str
    port: int
    door: tuple[str, int] = ("127.0.0.1", 0)  # the cable's own end; port 0: any free one


class SlowLinks:
    """A process with a proxy for each cable; use it as a context."""

    def __init__(self, cables: Sequence[Cable], speed: LinkSpeed) -> None:
        """Raises CoordinatorError when it can't be started."""
        if sys.platform != "linux":
            raise CoordinatorError("A slow link can be made up on Linux only.")
        order = {"cables": [asdict(cable) for cable in cables], **asdict(speed)}
        self._peer = Peer("moehive.coordinator.bench.slow_link", json.dumps(order))
        self.ports: list[int] = self._peer.greeting  # in the order of `cables`

    def __enter__(self) -> "SlowLinks":
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.end()


class _NativeCable(ctypes.Structure):
    """Cable of cpp/network.h, field for field."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("listener", "port", "source", "target"))


def main() -> None:
    """The process: prints the proxies' ports and works until its stdin ends."""
    order = json.loads(sys.argv[1])
    cables = [Cable(**cable) for cable in order["cables"]]
    library = load("moehive_slow_link_abi", _ABI, "coordinator.bench", "slow_link")
    run = library.moehive_slow_link_run
    size = ctypes.c_int64
    run.argtypes = (ctypes.c_void_p, size, size, size, ctypes.c_double, ctypes.c_int32)
    listeners = [socket.create_server((cable.door[0], cable.door[1])) for cable in cables]
    hosts = list({host: None for cable in cables for host in (cable.source, cable.target)})
    native = (_NativeCable * len(cables))()
    for place, (cable, listener) in enumerate(zip(cables, listeners, strict=True)):
        listener.setblocking(False)
        source, target = hosts.index(cable.source), hosts.index(cable.target)
        native[place] = _NativeCable(listener.fileno(), cable.port, source, target)
    print(json.dumps([listener.getsockname()[1] for listener in listeners]), flush=True)
    delay_ns, ns_per_byte = round(order["delay_s"] * 1e9), 8e9 / order["bits_per_s"]
    error = run(native, len(cables), len(hosts), delay_ns, ns_per_byte, sys.stdin.fileno())
    if error:
        sys.exit(f"The slow link can't go on: {os.strerror(error)}.")


if __name__ == "__main__":
    main()
