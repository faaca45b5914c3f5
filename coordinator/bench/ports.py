"""Ports for processes that have to know them before they start."""

import random
import socket
from contextlib import suppress


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now, nor will be given for an outgoing connection."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(15_000, 32_000)  # below those that Linux and macOS give to connections
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)
