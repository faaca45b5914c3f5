"""Experts twice as large as the RAM for them: how near decoding comes to what the disk allows.

A node's store and executor (expert_node/bench_tiers.py) run in a process whose control group has room for the RAM
allowance and the process itself, over a trace from a small model of routing: a token's state drifts from layer to
layer and from token to token, routers are random with some experts more popular than others, and a layer's experts
are foreseen by its router on the states of the two layers before. docs/tiers.md says how near that is to real models.
Without and with prefetch take turns of a few tokens, in the next round the other way round; the disk is measured
before and after each turn.
"""

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.machine import cores

from ..types import CoordinatorError
from .cache_aware import Divergence, measure_divergences
from .memory_group import MemoryGroup, memory_group
from .peers import Peer
from .tiers_trace import Trace, policy_hit_rates, routing_trace

# Qwen3.5-397B's: 7.1 MB each. A model whose experts lie on disk is a large one.
SPEC = ExpertSpec(hidden_size=4096, intermediate_size=1024, activation="silu", format="q4_0")
EXPERTS, TOP_K = 64, 8
ROUNDS = 2  # as many as ways take turns, so that each of the two is measured on each token
# Of the node's process itself: Python, torch, reading buffers; its libraries are page cache.
PROCESS_BYTES = 448 << 20
MARGINS = (0.1, 0.3)
KL_TOKENS = 128
LEARNED_TOKENS = 1024  # of the trace that counts of transitions learn from and are judged on
MODULE = "moehive.expert_node.bench_tiers"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRow:
    """One way: medians of its turns, and all turns together where it says `share` or `rate` of experts.

    The limit is the time to read what RAM did not have (`1 - hit_rate`, prefetches not counted as hits) at the speed
    of the disk around each turn, `disk_Bps`; `limit_share` is the measured speed's share of it.
    """

    way: str
    margin: float
    decode_tokens_per_s: float
    limit_tokens_per_s: float
    limit_share: float
    hit_rate: float  # of the RAM, without the help of prefetches
    foreseen_rate: float  # of the experts asked for: there because they were fetched ahead
    late_rate: float  # on their way when they were asked for
    unused_share: float  # of the prefetches: not used
    disk_Bps: float
    disk_busy: float  # share of the time in which it was read
    experts_alone_ms: float  # computing for one token, all in RAM
    expert_bytes: int
    ram_bytes: int  # allowance
    most_ram_bytes: int  # of experts, at any time
    process_bytes: int  # that the process held after its turns, without pages of files
    process_limit_bytes: int  # the allowance and the process itself
    group_limit_bytes: int  # 0: no control group could be made here
    group_peak_bytes: int
    killed: int  # processes, by the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersReport:
    """What `moehive bench tiers` prints."""

    rows: list[TierRow]
    prefetch_gain: float  # speed with prefetch over that without, in turns that follow each other; their median
    recall: list[float]  # of a layer's experts: named by the guess of the layer before, and of the one before that
    reuse: float  # of a layer's experts: asked for by the token before, too
    disk: dict[str, float]  # bytes a second of each way to read
    divergence: dict[str, dict[str, Divergence]]  # of models' outputs, by way: what cache-aware routing costs
    # Of what followed what, one and two layers later, on a longer trace: the share of a layer's experts that counts
    # of it name, and the share of those named that were asked for.
    transitions: list[list[float]]
    policies: dict[str, float]  # hit rates of ways to choose who makes room, on the same trace, without prefetch


def measure_tiers(quick: bool, model: Path | None, folder: Path | None = None) -> TiersReport:
    """Measures, with experts below `folder` (None: the folder for temporary files). Raises CoordinatorError.

    `model`: whose answers cache-aware routing changes, beside the trained-like models'.
    """
    layers, tokens = (6, 24) if quick else (48, 48)  # as many layers as Qwen3-30B has, which is about usual
    size = layers * EXPERTS * SPEC.nbytes
    with tempfile.TemporaryDirectory(prefix="moehive-tiers-", dir=folder) as name:
        place = Path(name)
        if shutil.disk_usage(place).free < size + (1 << 30):
            raise CoordinatorError(
                f"{place} has no room for experts of {size} bytes; name another folder with TMPDIR."
            )
        trace = routing_trace(2 * tokens, layers, EXPERTS, TOP_K, np.random.default_rng(0))
        _write(place, layers, trace)
        long = routing_trace(LEARNED_TOKENS, layers, EXPERTS, TOP_K, np.random.default_rng(0))
        np.save(place / "chosen.npy", long.chosen())
        with memory_group(size // 2 + PROCESS_BYTES) as group:
            report = _measure(place, layers, tokens, size // 2, group, trace)
        rows = [row for row in report.rows if row.margin]
        found = measure_divergences(model, [row.margin for row in rows], KL_TOKENS, place)
    ways = {row.way: {name: kinds[n] for name, kinds in found.items()} for n, row in enumerate(rows)}
    return replace(report, divergence=ways)


class _Turns:
    """What the ways' turns have shown."""

    def __init__(self) -> None:
        # Those of a set take turns. Cache-aware routing has sets of its own: it changes what is asked for later.
        self._sets: list[dict[str, tuple[bool, float]]] = [{"no prefetch": (False, 0.0), "prefetch": (True, 0.0)}]
        self._sets += [{f"prefetch, cache-aware {margin}": (True, margin)} for margin in MARGINS]
        self.margins = {way: margin for ways in self._sets for way, (_, margin) in ways.items()}
        self.found: dict[str, list[dict[str, float]]] = {way: [] for way in self.margins}
        self.disk: dict[str, list[float]] = {"buffered": [], "mmap": []}
        self.gains: list[float] = []

    def take(self, peer: Peer, first: int, tokens: int, trunk_s: float) -> None:
        """One round, of `tokens`; `first`: the way that begins. `trunk_s`: the coordinator's part of a layer."""
        for how, rates in self.disk.items():
            rates.append(float(peer.ask({"disk": how})))
        for ways in self._sets:
            turns = peer.ask({"ways": list(ways.values()), "trunk_s": trunk_s, "tokens": tokens, "first": first})
            for turn in turns:
                self.found[list(ways)[turn["way"]]].append(turn)
            if len(ways) == 2:
                self.gains += [_gain(*pair) for pair in zip(turns[::2], turns[1::2], strict=False)]


def _measure(place: Path, layers: int, tokens: int, ram: int, group: MemoryGroup | None, trace: Trace) -> TiersReport:
    config = {
        "folder": str(place),
        "spec": asdict(SPEC),
        "layers": layers,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "ram_bytes": ram,
        "threads": cores(),  # as a node by itself
        "group": None if group is None else str(group.folder),
    }
    turns = _Turns()
    peer = Peer(MODULE, json.dumps(config))
    try:
        alone = float(peer.greeting)
        for first in range(ROUNDS):
            # The coordinator's part of a layer takes as long as the experts': as in bench decode on two cores.
            turns.take(peer, first, tokens, alone / layers)
        transitions = peer.ask({"transitions": "chosen.npy"})
    finally:
        peer.end()
    rows = [_row(way, turns.margins[way], found, alone, ram, group) for way, found in turns.found.items()]
    direct = sum(row.disk_Bps for row in rows) / len(rows)
    return TiersReport(
        rows=rows,
        prefetch_gain=statistics.median(turns.gains),
        recall=trace.recall(),
        reuse=trace.reuse(),
        disk={"direct": direct, **{how: statistics.median(rates) for how, rates in turns.disk.items()}},
        divergence={},
        transitions=transitions,
        policies=policy_hit_rates(trace, ram // SPEC.nbytes),
    )


def _row(
    way: str,
    margin: float,
    turns: Sequence[dict[str, float]],
    alone: float,
    ram: int,
    group: MemoryGroup | None,
) -> TierRow:
    def total(name: str) -> float:
        return sum(turn[name] for turn in turns)

    def middle(name: str, of: str) -> float:
        return statistics.median(turn[name] / max(turn[of], 1e-9) for turn in turns)

    lookups = total("lookups")
    return TierRow(
        way=way,
        margin=margin,
        decode_tokens_per_s=middle("tokens", "seconds"),
        limit_tokens_per_s=middle("tokens", "limit_s"),
        limit_share=middle("limit_s", "seconds"),
        hit_rate=(total("here") - total("foreseen")) / lookups,
        foreseen_rate=total("foreseen") / lookups,
        late_rate=total("late") / lookups,
        unused_share=total("unused") / total("prefetches") if total("prefetches") else 0.0,
        disk_Bps=middle("missed_bytes", "limit_s"),
        disk_busy=middle("read_s", "seconds"),
        experts_alone_ms=alone * 1e3,
        expert_bytes=SPEC.nbytes,
        ram_bytes=ram,
        most_ram_bytes=int(max(turn["most_ram_bytes"] for turn in turns)),
        process_bytes=int(max(turn["anonymous_bytes"] for turn in turns)),
        process_limit_bytes=ram + PROCESS_BYTES,
        group_limit_bytes=0 if group is None else ram + PROCESS_BYTES,
        group_peak_bytes=0 if group is None else group.peak_bytes(),
        killed=0 if group is None else group.killed(),
    )


def _gain(one: dict[str, float], other: dict[str, float]) -> float:
    """How much faster the second way was than the first, whichever had its turn first."""
    slow, fast = sorted((one, other), key=lambda turn: turn["way"])
    return fast["tokens"] / fast["seconds"] / (slow["tokens"] / slow["seconds"])


def _write(place: Path, layers: int, trace: Trace) -> None:
    """All experts have the same bytes: what is measured does not look at them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {t.name: torch.randn(t.shape, generator=generator) / t.shape[-1] ** 0.5 for t in SPEC.tensors}
    blob = build_blob(SPEC, tensors).numpy().tobytes()
    for layer in range(layers):
        for number in range(EXPERTS):
            with (place / f"{layer}-{number}.expert").open("wb") as file:
                file.write(blob)
                os.fsync(file.fileno())  # what is written later would take the disk from what is measured
    np.savez(place / "trace.npz", scores=trace.scores, ahead=trace.ahead)
