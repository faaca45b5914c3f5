"""The hop's measurement: real processes answer over every kind of link, and the made-up network is one."""

import os
import socket
import threading
from contextlib import ExitStack

import pytest

from moehive.coordinator.bench import hop
from moehive.coordinator.bench.slow_link import Cable, LinkSpeed, SlowLinks


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := connection.recv(1 << 16)):
        data += piece
    return data


def test_what_passes_a_slow_link_is_unchanged() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    sent = os.urandom(300_000)
    speed = LinkSpeed(delay_s=0.01, bits_per_s=80e6)

    def echo() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(receive(connection, len(sent)))

    thread = threading.Thread(target=echo)
    thread.start()
    with SlowLinks([Cable("a", "b", listener.getsockname()[1])], speed) as links:
        with socket.create_connection(("127.0.0.1", links.ports[0])) as connection:
            connection.settimeout(30)
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert receive(connection, len(sent)) == sent
            assert connection.recv(1) == b""  # the other side's end came through too
    thread.join()
    listener.close()


@pytest.mark.parametrize("link", ["loopback", str(hop.LINK)])
def test_every_way_is_measured(link: str) -> None:
    rows = [hop.HopRow(nodes, 8192, tls, link) for nodes, tls in ((1, False), (2, True))]
    with ExitStack() as stack:
        bench = hop._Bench(stack, 2)
        for row in rows:
            bench.measure(row, 4)
    for row in rows:
        assert len(row.ours) == len(row.raw) == len(row.plain) == 4
        figures = row.figures()
        assert 0 < figures["p50_us"] <= figures["p99_us"]
        if link != "loopback":  # twice the delay, at the least
            assert min(row.ours + row.raw + row.plain) >= 2 * hop.LINK.delay_s
