"""What one layer's way to the nodes and back costs: `moehive bench hop` runs this.

A node's real service and the coordinator's real dispatcher, in processes of their own. Every row is measured in
rounds, and in each round all ways take their turn: ours, an echo of as many bytes over blocking TCP, and over a bare
grpc.aio stream. On a noisy machine only the ratios of one run say something.

The nodes' arithmetic, with experts as small as can be, is measured by the nodes and told apart: the hop is the rest.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .certificates import write_certificates
from .hop_case import HIDDEN, LINK, LOOPBACK, SLOWER_LINK, HopRow, cases
from .kernel_link import shaper
from .peers import Peer
from .slow_link import Cable, SlowLinks

LEAST_EXCHANGES, MOST_EXCHANGES = 5, 50  # of a row in a round
EXCHANGED_BYTES = 24 << 20  # in a round by a row, so many layers of a prompt one after the other
WARM_UP = 3  # exchanges


def measure_hop(quick: bool, report: Callable[[float], None]) -> list[HopRow]:
    """All rows; `quick`: fewer sizes, nodes and rounds. `report` hears what part is done. Raises CoordinatorError."""
    found = cases(quick)
    rows = [HopRow(case) for case in found]
    rounds = 3 if quick else 10
    with ExitStack() as stack:
        processes = HopProcesses(stack, max(case.nodes for case in found))
        for case in found:
            processes.measure(HopRow(case), WARM_UP)
        for number in range(rounds):
            for place, row in enumerate(rows):
                report((number + place / len(rows)) / rounds)
                exchanges = EXCHANGED_BYTES // (row.case.payload_bytes * row.case.nodes)
                processes.measure(row, max(LEAST_EXCHANGES, min(MOST_EXCHANGES, exchanges)))
    return rows


class HopProcesses:
    """Nodes, the coordinator's side, echoes and the links between them, until `stack` closes."""

    def __init__(self, stack: ExitStack, nodes: int) -> None:
        self._stack, self._nodes = stack, nodes
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        layer = {"hidden_size": HIDDEN, "intermediate_size": 32, "activation": "silu", "format": "q8_0"}
        self._layers = [{**layer, "experts": nodes}]
        write_certificates(self._folder, nodes)
        ports = [self._start_node(node) for node in range(nodes)]
        echo_ports: dict[str, int] = _start(stack, "moehive.coordinator.bench.echo", "serve").greeting
        cables = _cables(ports, echo_ports)
        self._echo_ports: dict[str, dict[str, int]] = {}  # by link and way
        addresses: dict[str, dict[str, list[str]]] = {}  # by link and kind of door, of each node
        onward: dict[str, list[str]] = {}  # by link: where the node before it in a chain finds each node
        for link in (None, LINK, SLOWER_LINK):
            if link is None:
                at = {purpose: cable.port for purpose, cable in cables.items()}
            else:
                slow = stack.enter_context(SlowLinks(list(cables.values()), link))
                at = dict(zip(cables, slow.ports, strict=True))
            name = LOOPBACK if link is None else str(link)
            self._echo_ports[name] = {way: at[way, 0] for way in echo_ports}
            addresses[name] = {
                kind: [f"127.0.0.1:{at[kind, node]}" for node in range(nodes)] for kind in ("tls", "open")
            }
            # The first of a chain is asked by the coordinator itself.
            after = [f"127.0.0.1:{at['onward', node]}" for node in range(1, nodes)]
            onward[name] = [addresses[name]["tls"][0], *after]
        order = {"addresses": addresses, "onward": onward, "layers": self._layers}
        order["tls"] = str(self._folder / "coordinator")
        self._ours = _start(stack, "moehive.coordinator.bench.hop_client", json.dumps(order))
        self._echo = _start(stack, "moehive.coordinator.bench.echo", "ask")

    def measure(self, row: HopRow, count: int) -> None:
        """Adds `count` exchanges of each way."""
        case = row.case
        by_kernel = self._by_kernel if case.prefill else None
        if case.link != LOOPBACK:
            row.made_by = "proxy" if by_kernel is None else str(shaper())
        answer = (by_kernel or self._ours).ask({"case": asdict(case), "count": count})
        row.eight_bit = answer["eight_bit"]
        for seconds, compute in answer["times"]:
            row.ours.append(seconds - compute)
            row.compute.append(compute)
        if case.prefill:
            return
        for way, times in (("raw", row.raw), ("plain", row.plain)):
            port = self._echo_ports[case.link][way]
            times += self._echo.ask({"way": way, "port": port, "payload_bytes": case.payload_bytes, "count": count})

    @functools.cached_property
    def _by_kernel(self) -> Peer | None:
        """Measures what is bound by bytes, for which a kernel that makes no delay will do; None: proxies have to."""
        found = shaper()
        if found is None:
            return None
        networks = {str(link): (link.delay_s, link.bits_per_s) for link in (LINK, SLOWER_LINK)}
        order: dict[str, Any] = {"queue": found.queue, "networks": networks, "nodes": self._nodes}
        order |= {"layers": self._layers, "folder": str(self._folder)}
        return _start(self._stack, "moehive.coordinator.bench.hop_link", json.dumps(order), prefix=found.prefix)

    def _start_node(self, node: int) -> dict[str, int]:
        """Its ports, with mutual TLS (`tls`) and without (`open`)."""
        config = {"layers": self._layers, "held": list(range(self._nodes)), "threads": 1}
        config["tls"] = str(self._folder / f"n{node}")
        ports: dict[str, int] = _start(self._stack, "moehive.expert_node.bench_node", json.dumps(config)).greeting
        return ports


def _cables(nodes: Sequence[dict[str, int]], echo: dict[str, int]) -> dict[tuple[str, int], Cable]:
    """By what they are for, and which node is at their end. Echoes take the place of the first node."""
    cables = {
        (kind, node): Cable("coordinator", f"n{node}", port)
        for node, ports in enumerate(nodes)
        for kind, port in ports.items()
    }
    cables |= {(way, 0): Cable("coordinator", "n0", port) for way, port in echo.items()}
    cables |= {
        ("onward", node): Cable(f"n{node - 1}", f"n{node}", nodes[node]["tls"]) for node in range(1, len(nodes))
    }
    return cables


def _start(stack: ExitStack, module: str, *arguments: str, prefix: Sequence[str] = ()) -> Peer:
    peer = Peer(module, *arguments, prefix=prefix)
    stack.callback(peer.end)
    return peer
