"""Loads a model as the coordinator does and measures its peak memory: `moehive bench load MODEL` runs this.

In a process of its own, so that the peak is this load's alone: the trunk goes into memory, then every expert's blob
is read, layer by layer, and dropped, as when it is sent to nodes.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..types import CoordinatorError
from .process_memory import peak_bytes

# Bytes allowed beside the trunk and two layers of experts: Python, torch, transformers, buffers.
OVERHEAD = 600 * 10**6


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One load's sizes (bytes) and times (seconds)."""

    trunk_bytes: int
    expert_bytes: int  # all experts
    largest_layer_bytes: int  # the experts of the largest layer
    peak_rss_bytes: int
    trunk_seconds: float  # opening the checkpoint and loading the trunk
    experts_seconds: float  # reading all experts

    @property
    def limit_bytes(self) -> int:
        """What the peak may be: trunk, two layers of experts, and the overhead."""
        return self.trunk_bytes + 2 * self.largest_layer_bytes + OVERHEAD

    @property
    def within_limit(self) -> bool:
        """Whether the peak kept to the limit."""
        return self.peak_rss_bytes <= self.limit_bytes


def measure_load(model: Path) -> LoadReport:
    """Loads the checkpoint in directory `model` in a fresh process and reports.

    Raises CoordinatorError, the process's own sentence, when the checkpoint cannot be loaded.
    """
    command = [sys.executable, "-m", "moehive.coordinator.bench.load", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise CoordinatorError(lines[-1] if lines else f"Loading {model} ended with status {done.returncode}.")
    return LoadReport(**json.loads(done.stdout.strip().splitlines()[-1]))


def _load(model: Path) -> LoadReport:
    from moehive.kernels.geometry import ExpertId

    from ..checkpoints.checkpoint import Checkpoint

    start = time.perf_counter()
    checkpoint = Checkpoint.open(model)
    architecture = checkpoint.load_trunk()
    loaded = time.perf_counter()
    manifest = checkpoint.manifest
    for layer, geometry in enumerate(manifest.layers):
        for expert in range(geometry.experts):
            checkpoint.expert_blob(ExpertId(layer, expert))
    done = time.perf_counter()
    del architecture  # held until here: the trunk stays in memory while experts are read
    return LoadReport(
        trunk_bytes=checkpoint.trunk_bytes,
        expert_bytes=manifest.total_bytes,
        largest_layer_bytes=max(layer.experts * layer.spec.nbytes for layer in manifest.layers),
        peak_rss_bytes=peak_bytes(os.getpid()),
        trunk_seconds=loaded - start,
        experts_seconds=done - loaded,
    )


def main() -> None:
    """The measured process: prints the report as JSON, or a sentence on stderr and status 1."""
    try:
        report = _load(Path(sys.argv[1]))
    except CoordinatorError as error:
        sys.exit(str(error))
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
