"""A node's store and executor alone, for `moehive bench tiers`: a trace of made-up requests over experts on disk.

`python -m moehive.expert_node.bench_tiers CONFIG`, with CONFIG in JSON: `folder` (of expert files and trace.npz),
`spec` (an ExpertSpec's fields), `layers`, `experts`, `top_k`, `ram_bytes`, `threads`, and `group`: a control group to
enter, or null. Prints the seconds that a token's experts take in RAM, then answers each line of JSON with one:
`{"disk": "buffered"}` or "mmap" with bytes a second of reading so, `{"transitions": FILE}` with how often counts of
what followed what are right, and
`{"ways": [[PREFETCH, MARGIN], …], "trunk_s": FLOAT, "tokens": N, "first": WAY}` with the figures of each turn, `way`
among them.
"""

import itertools
import json
import random
import statistics
import sys
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch

from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction, load_expert
from moehive.proto.tensors import Routing

from .courtesy import give_way
from .executor import Executor
from .store import ExpertStore
from .tiers.arena import padded
from .tiers.mapped import mapped_rate
from .tiers.reader import sample_rate
from .tiers.use import LAGS, Transitions

DISK_BYTES = 160 << 20  # of a measurement of the disk: in less it does not reach its speed
BLOCK = 4  # tokens of a way's turn: a disk that others use, too, is the same for the next way's


class Bench:
    """One configuration. The RAM tier goes on from run to run, as a node's does."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._folder = Path(config["folder"])
        self._spec = ExpertSpec(**config["spec"])
        self._ram_bytes: int = config["ram_bytes"]
        self._experts: int = config["experts"]
        layer = LayerGeometry(self._experts, config["top_k"], self._spec)
        self._manifest = Manifest("bench", "0" * 64, (layer,) * config["layers"])
        trace = np.load(self._folder / "trace.npz")
        self._scores = trace["scores"]  # [tokens, layers, experts], positive
        # [tokens, layers, 2, experts]: of the next two layers, as each layer foresees them
        self._ahead = trace["ahead"]
        self._ops = ExpertOps(config["threads"])
        self._files = [self._path(ExpertId(n, e)) for n in range(config["layers"]) for e in range(config["experts"])]
        self._random = random.Random(0)
        self._most = 0  # bytes of experts in RAM at any time

    def run(self, ways: list[tuple[bool, float]], trunk_s: float, tokens: int, first: int) -> list[dict[str, float]]:
        """Replays the trace; its first half, with the first way, is not counted.

        In the second half, ways (prefetch or not, and a margin) take turns of BLOCK tokens, beginning with way
        `first`. Before and after each turn the disk is measured: `limit_s` is the time in which it would have read
        what the RAM did not have, at that speed or the one that it had during the turn, whichever is higher. Returns
        the turns.
        """
        turns: list[dict[str, float]] = []
        self._tokens(range(tokens), *ways[0], trunk_s)
        rate = self._disk()
        for start in range(tokens, 2 * tokens, BLOCK):
            way = (first + len(turns)) % len(ways)
            replayed = range(start, min(start + BLOCK, 2 * tokens))
            before = self._figures()
            self._tokens(replayed, *ways[way], trunk_s)
            found = {name: value - before[name] for name, value in self._figures().items()}
            last, rate = rate, self._disk()
            missed = (found["lookups"] - found["here"] + found["foreseen"]) * padded(self._spec.nbytes)
            limit_s = missed / max((last + rate) / 2, found["read_bytes"] / max(found["read_s"], 1e-9))
            turns.append({**found, "way": way, "tokens": len(replayed), "missed_bytes": missed, "limit_s": limit_s})
        return [{**turn, "most_ram_bytes": self._most, "anonymous_bytes": _anonymous_bytes()} for turn in turns]

    def disk(self, way: str) -> float:
        """Bytes a second of reading files through the page cache, "buffered" or as "mmap"."""
        files = self._some_files()
        return mapped_rate(files) if way == "mmap" else sample_rate(files, direct=False)

    def transitions(self, name: str) -> list[tuple[float, float]]:
        """How often counts of transitions are right about the second half of the experts in file `name`.

        For each distance in layers the share of a layer's experts that they name, and the share of those named that
        were asked for. The file holds [tokens, layers, top_k].
        """
        chosen = np.load(self._folder / name)
        tokens, layers, _ = chosen.shape
        counts = Transitions([self._experts] * layers)
        asked, named, both = np.zeros(LAGS), np.zeros(LAGS), np.zeros(LAGS)
        for token, layer in itertools.product(range(tokens), range(layers)):
            counts.note(layer, chosen[token, layer].tolist())
            for lag in range(1, LAGS + 1) if 2 * token >= tokens else ():
                if layer + lag < layers:
                    guess, came = set(counts.likely(layer, lag)), set(chosen[token, layer + lag].tolist())
                    asked[lag - 1] += len(came)
                    named[lag - 1] += len(guess)
                    both[lag - 1] += len(guess & came)
        return list(zip((both / asked).tolist(), (both / np.maximum(named, 1)).tolist(), strict=True))

    def _tokens(self, tokens: range, prefetch: bool, margin: float, trunk_s: float) -> None:
        tier, layers, top_k = self._tier, len(self._manifest.layers), self._manifest.layers[0].top_k
        offsets, weights = np.array([0, top_k], dtype=np.uint32), np.full(top_k, 1 / top_k, dtype=np.float32)
        hidden = torch.randn(1, self._spec.hidden_size)
        for token, layer in itertools.product(tokens, range(layers)):
            turn = perf_counter()  # the coordinator's
            scores = self._scores[token, layer]
            if margin:
                scores = scores * (1 + margin * np.isin(np.arange(len(scores)), list(tier.resident(layer))))
            chosen = np.argpartition(-scores, top_k)[:top_k].astype(np.uint32)
            likely: list[list[int]] | None = None
            if prefetch:  # as coordinator/models/lean/foresight.py says it
                guesses = self._ahead[token, layer][: layers - 1 - layer]
                likely = np.argsort(-guesses)[:, : top_k * 3 // 2].tolist()
            routing = Routing(offsets, chosen, weights)
            sleep(max(0.0, turn + trunk_s - perf_counter()))
            self._executor.compute(layer, hidden, routing, Reduction.PARTIAL_SUM, likely)
            self._most = max(self._most, self._store.ram_bytes)

    def _disk(self) -> float:
        """Bytes a second that the disk gives as the node reads, now that nothing else is read."""
        self._tier.settle()
        return sample_rate(self._some_files(), direct=True, nbytes=DISK_BYTES)

    def _some_files(self) -> list[Path]:
        """Others each time: a virtual disk may still have those read last."""
        return self._random.sample(self._files, min(len(self._files), -(-DISK_BYTES // self._spec.nbytes)))

    def fill(self) -> None:
        """Makes the store; its RAM is full afterwards."""
        self._store = store = ExpertStore(self._ram_bytes, self._manifest.total_bytes)
        store.use(self._manifest, 1)
        store.make_room(self._manifest.total_bytes, ())
        blob = torch.from_file(str(self._files[0]), size=self._spec.nbytes, dtype=torch.uint8)
        weights = load_expert(self._spec, blob)
        for layer, geometry in enumerate(self._manifest.layers):
            for number in range(geometry.experts):
                expert = ExpertId(layer, number)
                store.add(expert, weights, self._path(expert))
        store.prepare()
        assert store.tier is not None
        self._tier, self._executor = store.tier, Executor(store, self._ops)
        self._tier.settle()

    def computed_alone(self, tokens: int) -> float:
        """Seconds that one token's experts take when all are in RAM: the median of `tokens`."""
        top_k, layers = self._manifest.layers[0].top_k, len(self._manifest.layers)
        blob = torch.from_file(str(self._files[0]), size=self._spec.nbytes, dtype=torch.uint8)
        held: dict[int, ExpertWeights] = {}
        for number in range(4 * top_k):  # more than caches hold
            copy = torch.empty(padded(self._spec.nbytes), dtype=torch.uint8)
            aligned = copy[-copy.data_ptr() % 64 :][: self._spec.nbytes]
            held[number] = load_expert(self._spec, aligned.copy_(blob))
        offsets, weights = np.array([0, top_k], dtype=np.uint32), np.full(top_k, 1 / top_k, dtype=np.float32)
        hidden = torch.randn(1, self._spec.hidden_size)
        seconds = []
        for _ in range(tokens):
            start = perf_counter()
            for layer in range(layers):
                chosen = (np.arange(top_k) + layer * top_k).astype(np.uint32) % (4 * top_k)
                self._ops.moe_layer(self._spec, held, hidden, offsets, chosen, weights, Reduction.PARTIAL_SUM)
            seconds.append(perf_counter() - start)
        return statistics.median(seconds)

    def _figures(self) -> dict[str, float]:
        totals, reader = self._tier.totals, self._tier.reader.totals
        return {
            "seconds": perf_counter(),
            "lookups": totals.lookups,
            "here": totals.here,
            "foreseen": totals.foreseen,
            "late": totals.late,
            "prefetches": totals.prefetches,
            "unused": totals.unused,
            "read_bytes": reader.nbytes,
            "read_s": reader.seconds,
        }

    def _path(self, expert: ExpertId) -> Path:
        return self._folder / f"{expert.layer}-{expert.expert}.expert"


def _anonymous_bytes() -> int:
    """Of this process in RAM, without the pages of files, which the kernel may drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    """The process."""
    config = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    give_way("127.0.0.1:1")  # as a node on the coordinator's machine
    bench = Bench(config)
    bench.computed_alone(1)
    alone = bench.computed_alone(8)
    if config["group"] is not None:
        (Path(config["group"]) / "cgroup.procs").write_text("0")
    bench.fill()
    print(json.dumps(alone), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer: Any
        if "disk" in question:
            answer = bench.disk(question["disk"])
        elif "transitions" in question:
            answer = bench.transitions(question["transitions"])
        else:
            answer = bench.run(**question)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
