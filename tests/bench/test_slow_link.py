"""The made-up network passes on what it gets, late and in order, whoever is slow or goes away."""

import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from moehive.coordinator.bench.slow_link import Cable, LinkSpeed, SlowLinks
from moehive.coordinator.types import CoordinatorError

QUICK = LinkSpeed(delay_s=0.0, bits_per_s=1e12)
MAX_QUEUED_BYTES = 4 << 20  # of one direction (cpp/byte_ring.h)


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        yield listener


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


@contextmanager
def connected(listener: socket.socket, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection that goes over a cable."""
    with socket.create_connection(("127.0.0.1", port)) as near:
        far, _ = listener.accept()
        with far:
            for end in (near, far):
                end.settimeout(30)
            yield near, far


def receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (piece := connection.recv(min(1 << 16, count - len(data)))):
        data += piece
    return bytes(data)


def send_in_pieces(connection: socket.socket, data: bytes, seed: int) -> None:
    """Writes of many sizes, and the end."""
    sizes, start = random.Random(seed), 0
    while start < len(data):
        size = sizes.choice((1, 100, 4096, 16 << 10, 40_000))
        connection.sendall(data[start : start + size])
        start += size
    connection.shutdown(socket.SHUT_WR)


def all_at_once(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_bytes_of_many_connections_pass_unchanged_both_ways() -> None:
    """Between three hosts whose cards all of them share; each direction ends by itself."""
    speed = LinkSpeed(delay_s=0.002, bits_per_s=400e6)
    contents = [
        (random.Random(n).randbytes(200_000 + n * 7919), random.Random(n + 100).randbytes(n * 9973)) for n in range(9)
    ]
    arrived: dict[tuple[int, str], bytes] = {}

    def exchange(number: int, side: str, end: socket.socket) -> None:
        out, back = contents[number] if side == "near" else contents[number][::-1]
        writer = threading.Thread(target=send_in_pieces, args=(end, out, number))
        writer.start()
        arrived[number, side] = receive(end, len(back) + 1)  # one more, so that the end has to come
        writer.join()

    with listening() as listener:
        cables = [Cable(*hosts, port_of(listener)) for hosts in (("a", "b"), ("b", "c"), ("c", "a"))]
        with SlowLinks(cables, speed) as links:
            ends = []
            for number in range(len(contents)):
                near = socket.create_connection(("127.0.0.1", links.ports[number % 3]))
                ends += [(number, "near", near), (number, "far", listener.accept()[0])]
            for _, _, end in ends:
                end.settimeout(30)
            all_at_once([lambda job=job: exchange(*job) for job in ends])  # type: ignore[misc]
            for _, _, end in ends:
                end.close()
    for number, (out, back) in enumerate(contents):
        assert arrived[number, "far"] == out and arrived[number, "near"] == back


def test_a_direction_goes_on_when_the_other_has_ended() -> None:
    with listening() as listener, SlowLinks([Cable("a", "b", port_of(listener))], QUICK) as links:
        with connected(listener, links.ports[0]) as (near, far):
            near.sendall(b"question")
            near.shutdown(socket.SHUT_WR)
            assert receive(far, 9) == b"question"
            for word in (b"an", b"answer"):
                far.sendall(word)
                assert receive(near, len(word)) == word
            far.shutdown(socket.SHUT_WR)
            assert near.recv(1) == b""


def test_a_receiver_that_does_not_read_stops_the_sender_and_loses_nothing() -> None:
    buffers = [int(Path(f"/proc/sys/net/ipv4/tcp_{name}").read_text().split()[2]) for name in ("rmem", "wmem")]
    most = MAX_QUEUED_BYTES + 2 * sum(buffers)  # of the two connections that bytes pass, whose sockets have room, too
    content = random.Random(1).randbytes(1_000_003) * (most // 1_000_003 + 8)
    with listening() as listener, SlowLinks([Cable("a", "b", port_of(listener))], QUICK) as links:
        with (
            connected(listener, links.ports[0]) as (near, far),
            connected(listener, links.ports[0]) as (other_near, other_far),
        ):
            near.setblocking(False)
            done = stuck = 0
            while stuck < 50:  # the other connection has gone there and back so often, and nothing more went in
                try:
                    done += near.send(content[done : done + (1 << 16)])
                    stuck = 0
                except BlockingIOError:
                    stuck += 1
                assert done <= most
                other_near.sendall(b"x")
                other_far.sendall(receive(other_far, 1))
                assert receive(other_near, 1) == b"x"
            near.settimeout(30)
            sent = content[: done + 2 * MAX_QUEUED_BYTES]  # the ring's seam passes
            rest = threading.Thread(target=send_in_pieces, args=(near, sent[done:], 1))
            rest.start()
            assert receive(far, len(sent) + 1) == sent
            rest.join()


def test_a_receiver_that_is_gone_ends_the_sender() -> None:
    speed = LinkSpeed(delay_s=0.001, bits_per_s=1e8)  # so slow that much is on its way
    with listening() as listener, SlowLinks([Cable("a", "b", port_of(listener))], speed) as links:
        for _ in range(3):  # those after the first show that the proxy goes on
            with connected(listener, links.ports[0]) as (near, far):
                near.sendall(b"x")
                assert far.recv(1) == b"x"
                far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                far.close()  # with a reset
                with pytest.raises(ConnectionError):
                    while True:
                        near.sendall(bytes(100_000))


def test_a_connection_that_has_ended_leaves_nothing_open() -> None:
    with listening() as listener, SlowLinks([Cable("a", "b", port_of(listener))], QUICK) as links:
        (proxy,) = (one for one in psutil.Process().children() if Cable.__module__ in one.cmdline())
        with connected(listener, links.ports[0]) as (asks, answers):
            before = proxy.num_fds()
            for first, second in (("near", "far"), ("far", "near")) * 5:
                with connected(listener, links.ports[0]) as (near, far):
                    ends = {"near": near, "far": far}
                    ends[first].shutdown(socket.SHUT_WR)
                    assert ends[second].recv(1) == b""
                    ends[second].shutdown(socket.SHUT_WR)
                    assert ends[first].recv(1) == b""
            asks.sendall(b"x")  # which passes when all of that is done
            assert answers.recv(1) == b"x"
            assert proxy.num_fds() == before


def test_where_nobody_listens_a_connection_ends() -> None:
    with listening() as listener, socket.create_server(("127.0.0.1", 0)) as nobody:
        cables = [Cable("a", "b", port_of(nobody)), Cable("a", "b", port_of(listener))]
        nobody.close()
        with SlowLinks(cables, QUICK) as links:
            with suppress(ConnectionError), socket.create_connection(("127.0.0.1", links.ports[0])) as near:
                near.settimeout(30)
                assert near.recv(1) == b""
            with connected(listener, links.ports[1]) as (near, far):
                near.sendall(b"x")
                assert far.recv(1) == b"x"


def test_nothing_is_quicker_than_the_delay_and_the_rate() -> None:
    speed, size = LinkSpeed(delay_s=0.003, bits_per_s=100e6), 50_000
    with listening() as listener, SlowLinks([Cable("a", "b", port_of(listener))], speed) as links:
        with connected(listener, links.ports[0]) as (near, far):
            for _ in range(10):
                start = time.perf_counter()
                near.sendall(bytes(size))
                far.sendall(receive(far, size))
                receive(near, size)
                assert time.perf_counter() - start >= 2 * (speed.delay_s + size * 8 / speed.bits_per_s)


@pytest.mark.parametrize("outward", [True, False])
def test_cables_share_the_card_that_they_meet_at(outward: bool) -> None:
    """From one host to four, and from four to one, all at once: it takes as long as all of it over one cable."""
    speed, size = LinkSpeed(delay_s=0.001, bits_per_s=100e6), 200_000
    hosts = [("a", f"b{n}") if outward else (f"b{n}", "a") for n in range(4)]
    with listening() as listener:
        with SlowLinks([Cable(*pair, port_of(listener)) for pair in hosts], speed) as links:
            nears = [socket.create_connection(("127.0.0.1", port)) for port in links.ports]
            fars = [listener.accept()[0] for _ in nears]
            start = time.perf_counter()
            senders: list[Callable[[], None]] = [lambda near=near: near.sendall(bytes(size)) for near in nears]  # type: ignore[misc]
            receivers: list[Callable[[], object]] = [lambda far=far: receive(far, size) for far in fars]  # type: ignore[misc]
            all_at_once(senders + receivers)  # type: ignore[operator]
            assert time.perf_counter() - start >= speed.delay_s + 4 * size * 8 / speed.bits_per_s
            for end in nears + fars:
                end.close()


def test_a_busy_card_holds_up_neither_its_other_direction_nor_other_hosts() -> None:
    """What is sent last comes first, since what was sent before takes 200 s."""
    speed, size = LinkSpeed(delay_s=0.001, bits_per_s=40e3), 1_000_000
    with listening() as listener:
        cables = [Cable(*hosts, port_of(listener)) for hosts in (("a", "b"), ("c", "b"), ("a", "d"))]
        with SlowLinks(cables, speed) as links, ExitStack() as stack:
            ends = [stack.enter_context(connected(listener, port)) for port in links.ports]
            (a, b), (c, other_b), (other_a, d) = ends
            a.sendall(bytes(size))
            for sender, receiver in ((b, a), (other_b, c), (d, other_a)):
                sender.sendall(b"x")
                assert receive(receiver, 1) == b"x"
            b.setblocking(False)
            with pytest.raises(BlockingIOError):
                receive(b, size)


def test_elsewhere_it_says_that_it_needs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CoordinatorError, match="Linux"):
        SlowLinks([Cable("a", "b", 1)], QUICK)


def test_the_process_ends_with_its_input() -> None:
    with listening() as listener:
        with SlowLinks([Cable("a", "b", port_of(listener))], QUICK) as links:
            port = links.ports[0]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
