"""Slow links that the kernel makes: hosts as network namespaces of our own, each with a cable to a switch.

The measuring process is started in a namespace of its own (`shaper`), which is a host, and makes the others
(`Hosts`). Nothing is made in the machine's own namespace, and all of it is gone when its processes are, however they
end. It takes util-linux, iproute2, and a user who may make namespaces: root, or one with user namespaces.
"""

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType

from .slow_link import LinkSpeed

_TOOLS = ("unshare", "nsenter", "ip", "tc")
_PACKETS = 10_000  # that netem keeps: more than a link's delay holds
# Packets are handed over in lots of so many bytes, and tbf lets as many and their headers through at once. A proxy's
# are as large: what passes before the rate counts must be little of a message.
_LOT_BYTES, _BURST_BYTES = 16 << 10, 18 << 10
_QUEUE_S = 0.05  # that tbf keeps before it drops


@dataclass(frozen=True, slots=True)
class Shaper:
    """How to have a link: words that start a process in a namespace of its own, and the queue to use there."""

    prefix: tuple[str, ...]
    queue: str  # netem: rate and delay; tbf: the rate alone, where the kernel has no netem

    def __str__(self) -> str:
        return "veth with netem" if self.queue == "netem" else "veth with tbf: no delay, for this kernel has no netem"


@functools.cache
def shaper() -> Shaper | None:
    """What this user may have; None: no namespaces, or no such queues. Tried out in a namespace that is gone then."""
    if any(shutil.which(tool) is None for tool in _TOOLS):
        return None
    prefix = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")
    for queue in ("netem", "tbf"):
        words = " ".join(queue_command(queue, "near", LinkSpeed(1e-3, 1e9)))
        script = f"ip link add switch type bridge && ip link add near type veth peer name far && {words}"
        if subprocess.run([*prefix, "sh", "-c", script], capture_output=True).returncode == 0:
            return Shaper(prefix, queue)
    return None


class Hosts:
    """Other hosts, and networks that lead to them; use it as a context, in a process that was started by `shaper`.

    Each host has a card in each network, the process's own too. What it sends to all others shares the network's
    rate, and so does what it receives.
    """

    def __init__(self, queue: str, networks: Sequence[LinkSpeed], others: int) -> None:
        """Raises CalledProcessError where the kernel refuses."""
        with ExitStack() as stack:
            switch, *hosts = (_namespace(stack) for _ in range(1 + others))
            self.prefixes = [_within(host) for host in hosts]  # words that start a process on each other host
            for number, speed in enumerate(networks):
                ip("link", "add", f"switch{number}", "type", "bridge", prefix=_within(switch))
                ip("link", "set", f"switch{number}", "up", prefix=_within(switch))
                for host, prefix in enumerate(((), *self.prefixes)):
                    card, port = f"card{number}", f"port{number}-{host}"
                    peer = ("peer", "name", port, "netns", str(switch))
                    ip("link", "add", card, "type", "veth", *peer, prefix=prefix)
                    ip("address", "add", f"{address(number, host)}/24", "dev", card, prefix=prefix)
                    _bring_up(queue, card, speed, prefix)
                    ip("link", "set", port, "master", f"switch{number}", prefix=_within(switch))
                    _bring_up(queue, port, replace(speed, delay_s=0.0), _within(switch))
            for prefix in ((), *self.prefixes):
                ip("link", "set", "lo", "up", prefix=prefix)
            self._stack = stack.pop_all()

    def bytes_sent(self) -> int:
        """Bytes that this process's host has sent into the first network so far, with all headers."""
        told = subprocess.run(
            ["tc", "-statistics", "-json", "qdisc", "show", "dev", "card0"], check=True, capture_output=True
        )
        return int(json.loads(told.stdout)[0]["bytes"])

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def address(network: int, host: int) -> str:
    """Of a host's card in a network; host 0 is the process's own, the others follow in their order."""
    return f"10.{77 + network}.0.{1 + host}"


def _namespace(stack: ExitStack) -> int:
    """A process in a network namespace of its own, by which it is named, until `stack` closes."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None and holder.stdout is not None
    stack.enter_context(holder)  # closes its pipes, which ends it
    holder.stdout.readline()  # from now on the namespace is its own
    return holder.pid


def _within(namespace: int) -> tuple[str, ...]:
    return ("nsenter", "--target", str(namespace), "--net")


def _bring_up(queue: str, device: str, speed: LinkSpeed, prefix: tuple[str, ...]) -> None:
    subprocess.run([*prefix, *queue_command(queue, device, speed)], check=True)
    ip("link", "set", device, "gso_max_size", str(_LOT_BYTES), "up", prefix=prefix)


def ip(*words: str, prefix: tuple[str, ...] = ()) -> None:
    """Raises CalledProcessError."""
    subprocess.run([*prefix, "ip", *words], check=True)


def queue_command(queue: str, device: str, speed: LinkSpeed) -> list[str]:
    """The command that gives a device its rate for what it sends, and delays that."""
    rate = f"{speed.bits_per_s:.0f}bit"
    how = {
        "netem": ["delay", f"{speed.delay_s * 1e6:.0f}us", "rate", rate, "limit", str(_PACKETS)],
        "tbf": ["rate", rate, "burst", str(_BURST_BYTES), "latency", f"{_QUEUE_S * 1e3:.0f}ms"],
    }
    return ["tc", "qdisc", "add", "dev", device, "root", queue, *how[queue]]
