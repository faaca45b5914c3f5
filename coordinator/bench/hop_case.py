"""What `moehive bench hop` measures: the combinations, and the figures of each."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from .slow_link import LinkSpeed

HIDDEN = 1024  # f32: 4 KiB a token
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes a number
PAYLOADS = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
NODES = (1, 2, 3, 4)
CHUNK_BYTES = 4 << 20  # of a prompt: 512 tokens of 2,048 numbers
LOOPBACK = "loopback"
LINK = LinkSpeed(delay_s=0.25e-3, bits_per_s=1e9)
SLOWER_LINK = LinkSpeed(delay_s=0.25e-3, bits_per_s=1e8)  # whose bytes, not this machine's processors, take the time


@dataclass(frozen=True, slots=True)
class HopCase:
    """One combination. `payload_bytes`: hidden states to each node, and as many bytes of rows back from each."""

    nodes: int
    payload_bytes: int
    tls: bool
    link: str
    dtype: str = "float32"  # of the hidden states
    exact: bool = False  # they travel as they are, though the link is slow
    chain: bool = False  # they travel from node to node; else from the coordinator to each
    prefill: bool = False  # bound by bytes: over a link that the kernel makes, where it makes some; without echoes

    @property
    def tokens(self) -> int:
        """Whose hidden states are the payload."""
        return self.payload_bytes // (DTYPES[self.dtype] * HIDDEN)


@dataclass(slots=True)
class HopRow:
    """What was measured of one combination."""

    case: HopCase
    made_by: str = ""  # what made the link
    eight_bit: bool = False  # hidden states travelled in 8 bits: the link's own choice
    ours: list[float] = field(default_factory=list)  # seconds, without the nodes' arithmetic
    compute: list[float] = field(default_factory=list)  # seconds of the slowest node's arithmetic
    raw: list[float] = field(default_factory=list)  # one blocking TCP echo of payload_bytes
    plain: list[float] = field(default_factory=list)  # one grpc.aio echo of payload_bytes

    def figures(self) -> dict[str, Any]:
        """The row as it is printed; times in microseconds, 0 for what was not measured."""
        ours, raw, plain = (statistics.median(times or [0.0]) * 1e6 for times in (self.ours, self.raw, self.plain))
        ranked = sorted(self.ours)
        return {
            "nodes": self.case.nodes,
            "payload_bytes": self.case.payload_bytes,
            "tls": self.case.tls,
            "link": self.case.link,
            "dtype": self.case.dtype,
            "exact": self.case.exact,
            "chain": self.case.chain,
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


def cases(quick: bool) -> list[HopCase]:
    """All combinations; `quick`: of fewer sizes and numbers of nodes."""
    payloads = (PAYLOADS[0], PAYLOADS[-1]) if quick else PAYLOADS
    nodes = (NODES[0], NODES[-1]) if quick else NODES
    decoding = [
        HopCase(count, payload, tls, link)
        for link in (LOOPBACK, str(LINK))
        for count in nodes
        for payload in payloads
        for tls in ((True, False) if link == LOOPBACK else (True,))
    ]
    in_8_bits = [
        HopCase(1, payloads[-1], True, str(LINK), dtype, exact, prefill=True)
        for dtype in DTYPES
        for exact in (False, True)
    ]
    chains = [
        HopCase(nodes[-1], CHUNK_BYTES, True, str(link), chain=chain, prefill=True)
        for link in (LINK, SLOWER_LINK)
        for chain in (False, True)
    ]
    return decoding + in_8_bits + chains


def summary(rows: list[HopRow]) -> dict[str, float]:
    """The figures that have a goal (docs/benchmarks.md), from the rows of one run."""
    row_of = {row.case: row for row in rows}
    small, large, slow = PAYLOADS[0], PAYLOADS[-1], str(LINK)
    bare, secure = (row_of[HopCase(1, small, tls, LOOPBACK)] for tls in (False, True))
    one, four = (row_of[HopCase(nodes, small, True, slow)] for nodes in (1, 4))
    figures = {
        "plain_ratio": bare.figures()["plain_ratio"],
        "tls_ratio": statistics.median(secure.ours) / statistics.median(bare.ours),
        "four_nodes_ratio": statistics.median(four.ours) / statistics.median(one.ours),
        "raw_share_of_1_mib": row_of[HopCase(1, large, False, LOOPBACK)].figures()["raw_share"],
        "added_us_on_loopback": (statistics.median(secure.ours) - statistics.median(secure.raw)) * 1e6,
        "added_us_on_slow_link": (statistics.median(one.ours) - statistics.median(one.raw)) * 1e6,
    }
    for dtype in DTYPES:
        exact, rounded = (row_of[HopCase(1, large, True, slow, dtype, how, prefill=True)] for how in (True, False))
        figures[f"prefill_gain_of_8_bits_{dtype}"] = exact.layer_s / rounded.layer_s
    for link in (LINK, SLOWER_LINK):
        star, chain = (
            row_of[HopCase(4, CHUNK_BYTES, True, str(link), chain=how, prefill=True)] for how in (False, True)
        )
        figures[f"prefill_gain_of_a_chain_of_four, {link}"] = star.layer_s / chain.layer_s
    return figures
