"""A node on the coordinator's own machine does not push the coordinator off its processor.

The coordinator asks all nodes of a layer one after the other. The kernel lets a thread that a message wakes begin at
once, and often on the processor of whoever sent it: the first node then computes while the others have not been asked
yet. A thread of the policy "batch" waits until the coordinator has asked everybody and gives its processor up.
Measured on two processors, two nodes of one thread, a shape of Qwen3.5-35B: 49.5 tokens a second instead of 40.7.
"""

import contextlib
import os
import socket
from ipaddress import ip_address

from moehive.proto.bounds import host_port


def own_and_other(coordinator: str) -> tuple[str, str]:
    """This machine's address on the way to `coordinator`, host:port, and the coordinator's. Raises OSError."""
    host, port = host_port(coordinator)
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing: the kernel only picks a route
        return str(probe.getsockname()[0]), str(where[0])


def give_way(coordinator: str) -> None:
    """On the machine of `coordinator`, host:port: this thread, and those that it starts, wait for their turn.

    Elsewhere, and where the system has no such policy, nothing changes.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    with contextlib.suppress(OSError):  # no way there, which others say; or a container that forbids it
        own, other = own_and_other(coordinator)
        if own == other or ip_address(other).is_loopback:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
