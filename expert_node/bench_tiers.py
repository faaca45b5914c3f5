"""A node's store and executor alone, for `moehive bench tiers`: a trace of made-up requests over experts on disk.

`python -m moehive.expert_node.bench_tiers CONFIG`, with CONFIG in JSON: `folder` (of expert files and trace.npz),
`spec` (an ExpertSpec's fields), `layers`, `experts`, `top_k`, `ram_bytes`, `threads`, and `group`: a control group to
enter, or null. Prints one line when it is ready, then answers each line of JSON with one: `{"disk": DIRECT}` with the
disk's bytes a second, and `{"prefetch": BOOL, "margin": FLOAT, "trunk_s": FLOAT, "tokens": N}` with a run's figures.
"""

import json
import sys
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch

from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction, load_expert
from moehive.proto.tensors import Routing

from .executor import Executor
from .store import ExpertStore
from .tiers.arena import padded
from .tiers.mapped import mapped_rate
from .tiers.reader import sample_rate


class Bench:
    """One configuration; each run starts with an empty RAM tier."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._folder = Path(config["folder"])
        self._spec = ExpertSpec(**config["spec"])
        self._ram_bytes: int = config["ram_bytes"]
        layer = LayerGeometry(config["experts"], config["top_k"], self._spec)
        self._manifest = Manifest("bench", "0" * 64, (layer,) * config["layers"])
        trace = np.load(self._folder / "trace.npz")
        self._scores = trace["scores"]  # [tokens, layers, experts], positive
        self._ahead = trace[
            "ahead"
        ]  # [tokens, layers, 2, experts]: of the next two layers, as each layer foresees them
        self._ops = ExpertOps(config["threads"])
        self.files = [self._path(ExpertId(0, number)) for number in range(config["experts"])]

    def run(self, prefetch: bool, margin: float, trunk_s: float, tokens: int) -> dict[str, Any]:
        """Replays the trace; the first half warms the RAM up and is not counted."""
        store = self._store()
        executor = Executor(store, self._ops)
        tier = store.tier
        assert tier is not None
        layers, top_k = len(self._manifest.layers), self._manifest.layers[0].top_k
        offsets, weights = np.array([0, top_k], dtype=np.uint32), np.full(top_k, 1 / top_k, dtype=np.float32)
        hidden = torch.randn(1, self._spec.hidden_size)
        most = 0
        before: dict[str, float] = {}
        for token in range(2 * tokens):
            if token == tokens:
                before = self._figures(store, executor)
            for layer in range(layers):
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
                executor.compute(layer, hidden, routing, Reduction.PARTIAL_SUM, likely)
                most = max(most, store.ram_bytes)
        after = self._figures(store, executor)
        figures = {name: after[name] - before[name] for name in after}
        tier.settle()
        store.close()
        return {**figures, "tokens": tokens, "most_ram_bytes": most, "expert_bytes": padded(self._spec.nbytes)}

    def computed_alone(self, tokens: int) -> float:
        """Seconds that one token's experts take when all are in RAM."""
        top_k, layers = self._manifest.layers[0].top_k, len(self._manifest.layers)
        blob = torch.from_file(str(self.files[0]), size=self._spec.nbytes, dtype=torch.uint8)
        held: dict[int, ExpertWeights] = {}
        for number in range(4 * top_k):  # more than caches hold
            copy = torch.empty(padded(self._spec.nbytes), dtype=torch.uint8)
            aligned = copy[-copy.data_ptr() % 64 :][: self._spec.nbytes]
            held[number] = load_expert(self._spec, aligned.copy_(blob))
        offsets, weights = np.array([0, top_k], dtype=np.uint32), np.full(top_k, 1 / top_k, dtype=np.float32)
        hidden = torch.randn(1, self._spec.hidden_size)
        start = perf_counter()
        for turn in range(tokens * layers):
            chosen = (np.arange(top_k) + turn * top_k).astype(np.uint32) % (4 * top_k)
            self._ops.moe_layer(self._spec, held, hidden, offsets, chosen, weights, Reduction.PARTIAL_SUM)
        return (perf_counter() - start) / tokens

    def _store(self) -> ExpertStore:
        store = ExpertStore(self._ram_bytes, self._manifest.total_bytes)
        store.use(self._manifest, 1)
        store.make_room(self._manifest.total_bytes, ())
        blob = torch.from_file(str(self.files[0]), size=self._spec.nbytes, dtype=torch.uint8)
        weights = load_expert(self._spec, blob)
        for layer, geometry in enumerate(self._manifest.layers):
            for number in range(geometry.experts):
                expert = ExpertId(layer, number)
                store.add(expert, weights, self._path(expert))
        store.prepare()
        return store

    def _figures(self, store: ExpertStore, executor: Executor) -> dict[str, float]:
        tier = store.tier
        assert tier is not None
        totals = tier.totals
        return {
            "seconds": perf_counter(),
            "compute_s": executor.totals.compute_ns / 1e9,
            "lookups": totals.lookups,
            "here": totals.here,
            "foreseen": totals.foreseen,
            "late": totals.late,
            "prefetches": totals.prefetches,
            "unused": totals.unused,
            "read_bytes": tier.reader.totals.nbytes,
            "read_s": tier.reader.totals.seconds,
        }

    def _path(self, expert: ExpertId) -> Path:
        return self._folder / f"{expert.layer}-{expert.expert}.expert"


def main() -> None:
    """The process."""
    config = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    bench = Bench(config)
    bench.computed_alone(1)
    if config["group"] is not None:
        (Path(config["group"]) / "cgroup.procs").write_text("0")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer: Any
        if "disk" in question:
            way = question["disk"]
            answer = mapped_rate(bench.files) if way == "mmap" else sample_rate(bench.files, way == "direct")
        elif "alone" in question:
            answer = bench.computed_alone(question["alone"])
        else:
            answer = bench.run(**question)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
