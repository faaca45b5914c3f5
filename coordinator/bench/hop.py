"""What one layer's way to the nodes and back costs: `moehive bench hop` runs this.

A node's real service and the coordinator's real dispatcher, in processes of their own. Every row is measured in
rounds, and in each round all ways take their turn: ours, an echo of as many bytes over blocking TCP, and over a bare
grpc.aio stream. On a noisy machine only the ratios of one run say something.

The nodes' arithmetic, with experts as small as can be, is measured by the nodes and told apart: the hop is the rest.
"""

import functools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .certificates import write_certificates
from .kernel_link import shaper
from .peers import Peer
from .slow_link import Cable, LinkSpeed, SlowLinks

HIDDEN = 1024  # f32: 4 KiB a token
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes a number
PAYLOADS = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
NODES = (1, 2, 3, 4)
LEAST_EXCHANGES, MOST_EXCHANGES = 5, 50  # of a row in a round
EXCHANGED_BYTES = 24 << 20  # in a round by a row, so many layers of a prompt one after the other
CHUNK_BYTES = 4 << 20  # of a prompt: 512 tokens of 2,048 numbers
LINK = LinkSpeed(delay_s=0.25e-3, bits_per_s=1e9)
SLOWER_LINK = LinkSpeed(delay_s=0.25e-3, bits_per_s=1e8)  # whose bytes, not this machine's processors, take the time


@dataclass(slots=True)
class HopRow:
    """One combination. `payload_bytes`: hidden states to each node, and as many bytes of rows back from each."""

    nodes: int
    payload_bytes: int
    tls: bool
    link: str
    dtype: str = "float32"  # of the hidden states
    exact: bool = False  # they travel as they are, though the link is slow
    chain: bool = False  # they travel from node to node; else from the coordinator to each
    prefill: bool = False  # bound by bytes: over a link that the kernel makes, where it makes some; without echoes
    made_by: str = ""  # what made the link
    eight_bit: bool = False  # they travelled in 8 bits: the link's own choice
    ours: list[float] = field(default_factory=list)  # seconds, without the nodes' arithmetic
    compute: list[float] = field(default_factory=list)  # seconds of the slowest node's arithmetic
    raw: list[float] = field(default_factory=list)  # one blocking TCP echo of payload_bytes
    plain: list[float] = field(default_factory=list)  # one grpc.aio echo of payload_bytes

    def figures(self) -> dict[str, Any]:
        """The row as it is printed; times in microseconds, 0 for what was not measured."""
        ours, raw, plain = (statistics.median(times or [0.0]) * 1e6 for times in (self.ours, self.raw, self.plain))
        ranked = sorted(self.ours)
        return {
            "nodes": self.nodes,
            "payload_bytes": self.payload_bytes,
            "tls": self.tls,
            "link": self.link,
            "dtype": self.dtype,
            "exact": self.exact,
            "chain": self.chain,
            "made_by": self.made_by,
            "eight_bit": self.eight_bit,
            "p50_us": ours,
            "p99_us": ranked[min(math.ceil(0.99 * len(ranked)), len(ranked)) - 1] * 1e6,
            "raw_p50_us": raw,
            "plain_p50_us": plain,
            "plain_ratio": ours / plain if plain else 0.0,
            "raw_share": raw / ours,
            "compute_us": statistics.median(self.compute) * 1e6,
        }

    @property
    def layer_s(self) -> float:
        """Median seconds of a layer, arithmetic included."""
        return statistics.median(hop + compute for hop, compute in zip(self.ours, self.compute, strict=True))


def summary(rows: list[HopRow]) -> dict[str, float]:
    """The figures that have a goal (docs/benchmarks.md), from the rows of one run."""

    def find(
        nodes: int,
        payload: int,
        tls: bool,
        link: str,
        dtype: str = "float32",
        exact: bool = False,
        chain: bool = False,
        prefill: bool = False,
    ) -> HopRow:
        (row,) = (
            row
            for row in rows
            if (row.nodes, row.payload_bytes, row.tls, row.link, row.dtype, row.exact, row.chain, row.prefill)
            == (nodes, payload, tls, link, dtype, exact, chain, prefill)
        )
        return row

    small, large, slow = PAYLOADS[0], PAYLOADS[-1], str(LINK)
    secure, bare = find(1, small, True, "loopback"), find(1, small, False, "loopback")
    one, four = find(1, small, True, slow), find(4, small, True, slow)
    figures = {
        "plain_ratio": bare.figures()["plain_ratio"],
        "tls_ratio": statistics.median(secure.ours) / statistics.median(bare.ours),
        "four_nodes_ratio": statistics.median(four.ours) / statistics.median(one.ours),
        "raw_share_of_1_mib": find(1, large, False, "loopback").figures()["raw_share"],
        "added_us_on_loopback": (statistics.median(secure.ours) - statistics.median(secure.raw)) * 1e6,
        "added_us_on_slow_link": (statistics.median(one.ours) - statistics.median(one.raw)) * 1e6,
    }
    for dtype in DTYPES:
        exact, rounded = (find(1, large, True, slow, dtype, exact, prefill=True) for exact in (True, False))
        figures[f"prefill_gain_of_8_bits_{dtype}"] = exact.layer_s / rounded.layer_s
    for link in (LINK, SLOWER_LINK):
        star, chain = (find(4, CHUNK_BYTES, True, str(link), chain=chain, prefill=True) for chain in (False, True))
        figures[f"prefill_gain_of_a_chain_of_four, {link}"] = star.layer_s / chain.layer_s
    return figures


def measure_hop(quick: bool, report: Callable[[float], None]) -> list[HopRow]:
    """All rows; `quick`: fewer sizes, nodes and rounds. `report` hears what part is done. Raises CoordinatorError."""
    payloads = (PAYLOADS[0], PAYLOADS[-1]) if quick else PAYLOADS
    nodes = (1, 4) if quick else NODES
    rounds = 3 if quick else 10
    rows = [
        HopRow(count, payload, tls, link)
        for link in ("loopback", str(LINK))
        for count in nodes
        for payload in payloads
        for tls in ((True, False) if link == "loopback" else (True,))
    ]
    rows += [
        HopRow(1, payloads[-1], True, str(LINK), dtype, exact, prefill=True)
        for dtype in DTYPES
        for exact in (False, True)
    ]
    rows += [
        HopRow(nodes[-1], CHUNK_BYTES, True, str(link), chain=chain, prefill=True)
        for link in (LINK, SLOWER_LINK)
        for chain in (False, True)
    ]
    with ExitStack() as stack:
        bench = _Bench(stack, max(nodes))
        for row in rows:
            bench.measure(row, 3)
            for times in (row.ours, row.compute, row.raw, row.plain):
                times.clear()  # that was to warm up
        for number in range(rounds):
            for place, row in enumerate(rows):
                report((number + place / len(rows)) / rounds)
                exchanges = EXCHANGED_BYTES // (row.payload_bytes * row.nodes)
                bench.measure(row, max(LEAST_EXCHANGES, min(MOST_EXCHANGES, exchanges)))
    return rows


class _Bench:
    """The processes, until `stack` closes."""

    def __init__(self, stack: ExitStack, nodes: int) -> None:
        self._stack, self._nodes = stack, nodes
        folder = self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        layers = self._layers = [
            {
                "hidden_size": HIDDEN,
                "intermediate_size": 1,
                "activation": "silu",
                "format": "f32",
                "experts": nodes,
            }
        ]
        write_certificates(folder, nodes)
        ports: dict[str, list[int]] = {"tls": [], "open": []}
        cables = []
        for node in range(nodes):
            config = {"layers": layers, "held": list(range(nodes)), "threads": 1, "tls": str(folder / f"n{node}")}
            peer = _start(stack, "moehive.expert_node.bench_node", json.dumps(config))
            for kind, port in peer.greeting.items():
                ports[kind].append(port)
                cables.append(Cable("coordinator", f"n{node}", port))
        self._echo_ports = {"loopback": _start(stack, "moehive.coordinator.bench.echo", "serve").greeting}
        for port in self._echo_ports["loopback"].values():
            cables.append(Cable("coordinator", "n0", port))
        # Of a chain: how each node reaches the next one.
        cables += [Cable(f"n{node - 1}", f"n{node}", ports["tls"][node]) for node in range(1, nodes)]
        addresses = {"loopback": {kind: [f"127.0.0.1:{port}" for port in numbers] for kind, numbers in ports.items()}}
        onward = {"loopback": addresses["loopback"]["tls"]}
        for link in (LINK, SLOWER_LINK):
            slow = stack.enter_context(SlowLinks(cables, link)).ports
            self._echo_ports[str(link)] = dict(zip(self._echo_ports["loopback"], slow[2 * nodes :], strict=False))
            far = [f"127.0.0.1:{port}" for port in slow]
            addresses[str(link)] = {kind: far[place : 2 * nodes : 2] for place, kind in enumerate(ports)}
            onward[str(link)] = [far[0], *far[len(far) - nodes + 1 :]]
        order = {"addresses": addresses, "onward": onward, "tls": str(folder / "coordinator"), "layers": layers}
        self._ours = _start(stack, "moehive.coordinator.bench.hop_client", json.dumps(order))
        self._echo = _start(stack, "moehive.coordinator.bench.echo", "ask")

    @functools.cached_property
    def _by_kernel(self) -> Peer | None:
        """Measures what is bound by bytes, for which a kernel that makes no delay will do; None: proxies have to."""
        found = shaper()
        if found is None:
            return None
        networks = {str(link): (link.delay_s, link.bits_per_s) for link in (LINK, SLOWER_LINK)}
        order = {"queue": found.queue, "networks": networks, "nodes": self._nodes, "layers": self._layers}
        order["folder"] = str(self._folder)
        return _start(self._stack, "moehive.coordinator.bench.hop_link", json.dumps(order), prefix=found.prefix)

    def measure(self, row: HopRow, count: int) -> None:
        """Adds `count` exchanges of each way."""
        ask = {
            "tokens": row.payload_bytes // (DTYPES[row.dtype] * HIDDEN),
            "dtype": row.dtype,
            "nodes": row.nodes,
            "tls": row.tls,
            "kind": row.link,
            "exact": row.exact,
            "chain": row.chain,
        }
        by_kernel = self._by_kernel if row.prefill else None
        if row.link != "loopback":
            row.made_by = "proxy" if by_kernel is None else str(shaper())
        answer = (by_kernel or self._ours).ask({**ask, "count": count})
        row.eight_bit = answer["eight_bit"]
        for seconds, compute in answer["times"]:
            row.ours.append(seconds - compute)
            row.compute.append(compute)
        if row.prefill:
            return
        for way, times in (("raw", row.raw), ("plain", row.plain)):
            port = self._echo_ports[row.link][way]
            times += self._echo.ask({"way": way, "port": port, "payload_bytes": row.payload_bytes, "count": count})


def _start(stack: ExitStack, module: str, *arguments: str, prefix: Sequence[str] = ()) -> Peer:
    peer = Peer(module, *arguments, prefix=prefix)
    stack.callback(peer.end)
    return peer
