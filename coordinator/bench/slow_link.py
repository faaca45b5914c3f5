"""A made-up network on loopback: TCP proxies that delay and limit what passes, as cables between hosts would.

Each host has one network card: what it sends to all others shares its rate, and so does what it receives. One
process carries all cables, in one thread that sleeps until the next piece is due.
"""

import ctypes
import heapq
import itertools
import json
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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
        self.queued = 0  # bytes read and not yet passed on
        self.late: deque[bytes] = deque()  # due, but the receiver has no room; empty bytes end it
        self.ended = False  # nothing more is read
        self.over = False  # nothing more is passed on


class _Network:
    """All cables, until stdin ends.

    Sockets are told to epoll once, since the proxy takes its time from the processors that are measured.
    """

    def __init__(self, delay_s: float, bits_per_s: float) -> None:
        self._delay = delay_s
        self._seconds_a_byte = 8 / bits_per_s
        self._free: dict[tuple[str, str], float] = {}  # (host, "out" or "in") → when its card is free
        self._listeners: dict[int, tuple[socket.socket, Cable]] = {}
        self._flows: dict[int, tuple[_Flow, _Flow]] = {}  # socket → what is read from it, what is written to it
        self._pieces: list[tuple[float, int, _Flow, bytes]] = []  # a heap: when due; empty bytes end the direction
        self._pieces_read = itertools.count()  # those due at once keep their order
        self._poll = select.epoll()
        self._watched: dict[int, int] = {}  # socket → the events that epoll looks for
        self._poll.register(sys.stdin, select.EPOLLIN)

    def listen(self, cable: Cable) -> int:
        listener = socket.create_server((cable.door[0], cable.door[1]))
        self._listeners[listener.fileno()] = listener, cable
        self._poll.register(listener, select.EPOLLIN)
        return int(listener.getsockname()[1])

    def run(self) -> None:
        while True:
            timeout = max(self._pieces[0][0] - time.monotonic(), 0) if self._pieces else None
            select.select([self._poll], [], [], timeout)  # epoll's own timeout is in whole milliseconds
            for number, events in self._poll.poll(0):
                if number == sys.stdin.fileno():
                    return
                if number in self._listeners:
                    self._accept(*self._listeners[number])
                else:
                    self._go_on(number, events)
            now = time.monotonic()
            while self._pieces and self._pieces[0][0] <= now:
                _, _, flow, data = heapq.heappop(self._pieces)
                if not flow.over:
                    flow.late.append(data)
                    self._write(flow)

    def _accept(self, listener: socket.socket, cable: Cable) -> None:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", cable.port))
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there = _Flow(near, far, (cable.source, cable.target))
        back = _Flow(far, near, (cable.target, cable.source))
        self._flows[near.fileno()], self._flows[far.fileno()] = (there, back), (back, there)
        self._watch(near)
        self._watch(far)

    def _go_on(self, number: int, events: int) -> None:
        """With what epoll has found at a socket; a connection that another event has closed has no flows."""
        inward, outward = self._flows.get(number, (None, None))
        if outward is not None and outward.late:
            self._write(outward)
        if inward is not None and not inward.ended and events & ~select.EPOLLOUT:
            self._read(inward)

    def _watch(self, end: socket.socket) -> None:
        """Looks for what can go on at `end`: something to read, or room for what is late."""
        number = end.fileno()
        inward, outward = self._flows[number]
        reads = not inward.ended and inward.queued < MAX_QUEUED_BYTES
        wanted = (select.EPOLLIN if reads else 0) | (select.EPOLLOUT if outward.late else 0)
        watched = self._watched.get(number, 0)
        if wanted == watched:
            return
        if not wanted:
            self._poll.unregister(end)  # or it would report forever that the other side has hung up
        elif not watched:
            self._poll.register(end, wanted)
        else:
            self._poll.modify(end, wanted)
        self._watched[number] = wanted

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
        heapq.heappush(self._pieces, (received + self._delay, next(self._pieces_read), flow, data))
        self._watch(flow.source)

    def _write(self, flow: _Flow) -> None:
        """Passes on what is due, as far as the receiver has room for it."""
        try:
            while flow.late and not flow.over:
                data = flow.late.popleft()
                if not data:
                    flow.over = True
                    flow.target.shutdown(socket.SHUT_WR)
                    break
                try:
                    sent = flow.target.send(data)
                except BlockingIOError:
                    sent = 0
                flow.queued -= sent
                if sent < len(data):
                    flow.late.appendleft(data[sent:])
                    break
        except OSError:  # the receiver is gone: what is left has nowhere to go
            flow.over = flow.ended = True
        if flow.over:
            flow.late.clear()
            _, back = self._flows[flow.source.fileno()]
            if back.over:
                self._close(flow)
                return
        self._watch(flow.source)
        self._watch(flow.target)

    def _close(self, flow: _Flow) -> None:
        """Closes both ends of a connection whose directions are over."""
        for end in (flow.source, flow.target):
            number = end.fileno()
            if self._watched.pop(number, 0):
                self._poll.unregister(end)
            del self._flows[number]
            end.close()


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
