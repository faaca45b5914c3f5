"""A load over a link of 1 Gbit/s: one that the kernel makes where this user may have one made, else a proxy's.

A load is bound by the link's rate, so a kernel that makes no delay will do (for a message of `bench hop` or
`bench decode` it would not). The kernel's link takes a process in a namespace of its own, which this module is, too.
"""

import asyncio
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from .fetch_cluster import FetchModel, Route, fetch_cluster
from .kernel_link import Hosts, Shaper, address, shaper
from .peers import Peer
from .ports import free_ports
from .slow_link import Cable, LinkSpeed, SlowLinks

GIGABIT = LinkSpeed(0.00025, 1e9)


async def over_a_link(folder: Path, model: FetchModel) -> dict[str, Any]:
    """The row: what share of the link a load uses, and what made the link. Raises CoordinatorError."""
    found = await asyncio.to_thread(shaper)
    if found is not None:
        return await asyncio.to_thread(_elsewhere, folder, model.experts, found)
    ports = free_ports(1)[0], free_ports(1)[0]
    advertise = "127.0.0.2"  # the nodes know another address of loopback, behind which the link is
    cables = [Cable("coordinator", "nodes", port, (advertise, port)) for port in ports]
    with SlowLinks(cables, GIGABIT):
        return await _load(folder, model, Route(advertise=advertise, ports=ports), "proxy")


def _elsewhere(folder: Path, experts: int, found: Shaper) -> dict[str, Any]:
    peer = Peer(__name__, str(folder), str(experts), found.queue, prefix=found.prefix)
    peer.end()
    row: dict[str, Any] = peer.greeting
    return row | {"made_by": str(found)}


async def _load(folder: Path, model: FetchModel, route: Route, made_by: str) -> dict[str, Any]:
    async with fetch_cluster(folder, model, 1, 1, route) as cluster:
        seconds = await cluster.load()
    share = model.nbytes * 8 / seconds / GIGABIT.bits_per_s
    row = {"row": "link", "link": str(GIGABIT), "made_by": made_by, "bytes": model.nbytes, "seconds": seconds}
    return row | {"share": share}


def main() -> None:
    """The process, in a network namespace of its own: prints the row. It ends when its stdin does."""
    import uvloop

    done = threading.Event()

    def until_the_end() -> None:
        while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin: a thread that waits in there disturbs the exit
            pass
        if not done.is_set():
            os.kill(os.getpid(), signal.SIGINT)  # so that nodes are ended, too

    threading.Thread(target=until_the_end, daemon=True).start()
    folder, experts, queue = sys.argv[1:]
    with suppress(KeyboardInterrupt):
        with Hosts(queue, [GIGABIT], 1) as hosts:
            here = address(0, 0)
            route = Route(host=here, advertise=here, prefix=hosts.prefixes[0])
            row = uvloop.run(_load(Path(folder), FetchModel(int(experts)), route, queue))
            # Of packets' headers a proxy has none; real cables carry them, too.
            row["share_with_headers"] = hosts.bytes_sent() * 8 / row["seconds"] / GIGABIT.bits_per_s
        done.set()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
