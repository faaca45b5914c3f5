"""The hop over links that the kernel makes, whose cost in processor time is next to none: for rows that bytes bound.

A process in a network namespace of its own, with nodes and a coordinator's side beside those of hop.py, each on a
host of its own. Argument: JSON with `queue` (kernel_link.py), `networks` (by link its delay in seconds and bits a
second), `nodes` (how many), `layers` as bench_node.py takes them, and `folder` of certificates. Each line of stdin
is a measurement as hop_client.py takes it; it ends when its stdin does.
"""

import json
import sys
from contextlib import ExitStack, suppress
from typing import Any

from .kernel_link import Hosts, address
from .peers import Peer
from .slow_link import LinkSpeed


def main() -> None:
    """The process."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    networks: dict[str, list[float]] = order["networks"]
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        speeds = [LinkSpeed(*speed) for speed in networks.values()]
        hosts = stack.enter_context(Hosts(order["queue"], speeds, order["nodes"]))
        ports: list[dict[str, int]] = []
        for node, prefix in enumerate(hosts.prefixes):
            config = {
                "layers": order["layers"],
                "held": list(range(order["nodes"])),
                "threads": 1,
                "tls": f"{order['folder']}/n{node}",
                "host": "0.0.0.0",
            }
            peer = Peer("moehive.expert_node.bench_node", json.dumps(config), prefix=prefix)
            stack.callback(peer.end)
            ports.append(peer.greeting)
        addresses = {
            link: {
                kind: [f"{address(number, 1 + node)}:{port[kind]}" for node, port in enumerate(ports)]
                for kind in ("tls", "open")
            }
            for number, link in enumerate(networks)
        }
        client = Peer(
            "moehive.coordinator.bench.hop_client",
            json.dumps(
                {
                    "addresses": addresses,
                    "onward": {link: kinds["tls"] for link, kinds in addresses.items()},
                    "tls": f"{order['folder']}/coordinator",
                    "layers": order["layers"],
                }
            ),
        )
        stack.callback(client.end)
        print(json.dumps("ready"), flush=True)
        while line := sys.stdin.readline():
            print(json.dumps(client.ask(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
