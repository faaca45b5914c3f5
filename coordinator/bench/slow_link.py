"""A made-up network on loopback: TCP proxies that delay and limit what passes, as cables between hosts would.

Each host has one network card: what it sends to all others shares its rate, and so does what it receives. One
process carries all cables, in one thread that sleeps until the next piece is due.
"""

import ctypes
import json
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .peers import Peer

PIECE_BYTES = 16 << 10  # read and passed on at once: 0.13 ms at 1 Gbit/s
MAX_QUEUED_BYTES = 4 << 20  # in one direction of one connection; then the sender's own TCP waits
_PR_SET_TIMERSLACK = 29  # prctl: how late the kernel may wake us; 50 µs unless told


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
        order = {"cables": [asdict(cable) for cable in cables], **asdict(speed)}
        self._peer = Peer("moehive.coordinator.bench.slow_link", json.dumps(order))
        self.ports: list[int] = self._peer.greeting  # in the order of `cables`

    def __enter__(self) -> "SlowLinks":
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.end()


class _Flow:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, target: socket.socket, hosts: tuple[str, str]) -> None:
        self.source, self.target, self.hosts = source, target, hosts
        self.pieces: deque[tuple[float, bytes]] = deque()  # when due, what; empty bytes end the direction
        self.queued = 0
        self.ended = False
        self.blocked = False  # the receiver's buffer is full


class _Network:
    """All cables, until stdin ends."""

    def __init__(self, delay_s: float, bits_per_s: float) -> None:
        self._delay = delay_s
        self._seconds_a_byte = 8 / bits_per_s
        self._free: dict[tuple[str, str], float] = {}  # (host, "out" or "in") → when its card is free
        self._listeners: dict[socket.socket, Cable] = {}
        self._flows: list[_Flow] = []

    def listen(self, cable: Cable) -> int:
        listener = socket.create_server((cable.door[0], cable.door[1]))
        self._listeners[listener] = cable
        return int(listener.getsockname()[1])

    def run(self) -> None:
        while True:
            open_flows = [flow for flow in self._flows if not flow.ended and flow.queued < MAX_QUEUED_BYTES]
            readers: dict[Any, _Flow] = {flow.source: flow for flow in open_flows}
            writers = {flow.target: flow for flow in self._flows if flow.blocked}
            dues = [flow.pieces[0][0] for flow in self._flows if flow.pieces and not flow.blocked]
            timeout = max(min(dues) - time.monotonic(), 0) if dues else None
            readable, writable, _ = select.select([*readers, *self._listeners, sys.stdin], [*writers], [], timeout)
            for target in writable:
                writers[target].blocked = False
            if sys.stdin in readable:
                return
            for source in readable:
                if source in self._listeners:
                    self._accept(source)
                else:
                    self._read(readers[source])
            now = time.monotonic()
            for flow in self._flows:
                self._write(flow, now)
            self._flows = [flow for flow in self._flows if not flow.ended or flow.pieces]

    def _accept(self, listener: socket.socket) -> None:
        cable = self._listeners[listener]
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", cable.port))
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._flows.append(_Flow(near, far, (cable.source, cable.target)))
        self._flows.append(_Flow(far, near, (cable.target, cable.source)))

    def _read(self, flow: _Flow) -> None:
        try:
            data = flow.source.recv(PIECE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        flow.ended = not data
        flow.queued += len(data)
        took = len(data) * self._seconds_a_byte
        out, into = (flow.hosts[0], "out"), (flow.hosts[1], "in")
        sent = max(time.monotonic(), self._free.get(out, 0.0)) + took
        # Bits are passed on as they come: the receiver's card is busy at the same time, unless others were first.
        received = max(sent, self._free.get(into, 0.0) + took)
        self._free[out], self._free[into] = sent, received
        flow.pieces.append((received + self._delay, data))

    def _write(self, flow: _Flow, now: float) -> None:
        while flow.pieces and flow.pieces[0][0] <= now and not flow.blocked:
            due, data = flow.pieces.popleft()
            try:
                if not data:
                    flow.target.shutdown(socket.SHUT_WR)
                    return
                sent = flow.target.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:  # the receiver is gone: what is left has nowhere to go
                flow.pieces.clear()
                flow.ended = True
                return
            flow.queued -= sent
            if sent < len(data):
                flow.pieces.appendleft((due, data[sent:]))
                flow.blocked = True


def main() -> None:
    """The process: prints the proxies' ports and works until its stdin ends."""
    order = json.loads(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    network = _Network(order["delay_s"], order["bits_per_s"])
    print(json.dumps([network.listen(Cable(**cable)) for cable in order["cables"]]), flush=True)
    network.run()


if __name__ == "__main__":
    main()
