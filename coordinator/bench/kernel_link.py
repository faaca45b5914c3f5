"""A slow link that the kernel makes: two network namespaces of our own, a cable between them, and its queues.

The measuring process is started in a namespace of its own (`shaper`), and makes another one (`FarSide`) for those at
the other end. Nothing is made in the machine's own namespace, and all of it is gone when its processes are, however
they end. It takes util-linux, iproute2, and a user who may make namespaces: root, or one with user namespaces.
"""

import functools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from types import TracebackType

from .slow_link import LinkSpeed

NEAR, FAR = "10.77.0.1", "10.77.0.2"
_TOOLS = ("unshare", "nsenter", "ip", "tc")
_PACKETS = 10_000  # that netem keeps: more than a link's delay holds
_BURST_BYTES, _QUEUE_S = 256 << 10, 0.05  # of tbf: what goes at once (a kernel's timer ticks 250 times a second)


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
        script = f"ip link add near type veth peer name far && {words}"
        if subprocess.run([*prefix, "sh", "-c", script], capture_output=True).returncode == 0:
            return Shaper(prefix, queue)
    return None


class FarSide:
    """The other namespace, at the end of a cable; use it as a context, in a process that was started by `shaper`."""

    def __init__(self, queue: str, speed: LinkSpeed) -> None:
        """Raises CalledProcessError where the kernel refuses."""
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; read line"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None
        self._holder.stdout.readline()  # from now on the namespace is its own
        self.prefix = ("nsenter", "--target", str(self._holder.pid), "--net")
        try:
            ip("link", "add", "near", "type", "veth", "peer", "name", "far", "netns", str(self._holder.pid))
            for prefix, name, address in ((), "near", NEAR), (self.prefix, "far", FAR):
                subprocess.run([*prefix, *queue_command(queue, name, speed)], check=True)
                ip("address", "add", f"{address}/30", "dev", name, prefix=prefix)
                for device in ("lo", name):
                    ip("link", "set", device, "up", prefix=prefix)
        except BaseException:
            self._end()
            raise

    def bytes_sent(self) -> int:
        """Bytes that this end has sent to the far one so far, with all headers."""
        told = subprocess.run(
            ["tc", "-statistics", "-json", "qdisc", "show", "dev", "near"], check=True, capture_output=True
        )
        return int(json.loads(told.stdout)[0]["bytes"])

    def __enter__(self) -> "FarSide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait()
        self._holder.stdout.close()


def ip(*words: str, prefix: tuple[str, ...] = ()) -> None:
    """Raises CalledProcessError."""
    subprocess.run([*prefix, "ip", *words], check=True)


def queue_command(queue: str, device: str, speed: LinkSpeed) -> list[str]:
    """The command that gives a device its rate; each end delays what it sends, so the delay is one way."""
    rate = f"{speed.bits_per_s:.0f}bit"
    how = {
        "netem": ["delay", f"{speed.delay_s * 1e6:.0f}us", "rate", rate, "limit", str(_PACKETS)],
        "tbf": ["rate", rate, "burst", str(_BURST_BYTES), "latency", f"{_QUEUE_S * 1e3:.0f}ms"],
    }
    return ["tc", "qdisc", "add", "dev", device, "root", queue, *how[queue]]
