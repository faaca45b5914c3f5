"""`moehive bench convert --budget`: a conversion within a budget whose model is larger than what it may hold.

The formats are chosen and the pack is made in a process of their own, so that its peak memory is its own: once to the
choice, once to the end.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moehive.kernels.machine import cores

from ..checkpoints.opening import open_model
from ..checkpoints.pack.convert import convert
from ..cli.budget import BudgetChooser
from ..estimate.geometries import VOCABULARY
from ..estimate.headers import of_files
from ..types import CoordinatorError
from .process_memory import peak_bytes
from .random_file import random_file
from .random_model import RandomModel

MODEL = RandomModel(geometry="qwen3.5-35b", format="bf16_safetensors", layers=4, experts=16)
HELD = 128 << 20  # bytes of experts that may be held; the model has 403 MB of them, a layer 101
_SHARE = 0.25  # of the model's bytes, as budget: four bits a weight
TEXT = "The harbour lies open to the west, and the fishermen watch the sky. " * 24  # a token for each letter
_BASE_BYTES = 10**9  # the process without all that is counted in `limit_bytes`


def measure_convert_budget(folder: Path, workers: int) -> list[dict[str, Any]]:
    """One row. `folder` takes the model, which stays, and the pack. Raises CoordinatorError, OSError."""
    model = random_file(MODEL, folder / "models")
    return [measure_one(model, folder, HELD, workers)]


def measure_one(model: Path, folder: Path, held: int, workers: int) -> dict[str, Any]:
    """The memory of a conversion of `model` in which `held` bytes of experts may be held while the text is run."""
    files = of_files(str(model))
    budget = int(_SHARE * (files.expert_bytes + files.trunk_bytes))
    with TemporaryDirectory(dir=folder, prefix="pack-") as packs:
        text = Path(packs) / "text.txt"
        text.write_text(TEXT)
        command = [sys.executable, "-m", "moehive.coordinator.bench.convert_budget"]
        command += [str(model), f"{packs}/pack", str(budget), str(held), str(text), str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CoordinatorError((done.stderr.strip().splitlines() or ["The conversion failed."])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    limit = limit_bytes(model, held, workers)
    return {
        "model": model.name,
        "workers": workers,
        "expert_bytes": files.expert_bytes,
        "held_bytes": held,
        **found,
        "limit_bytes": limit,
        "within_limit": found["peak_rss_bytes"] <= limit,
    }


def limit_bytes(model: Path, held: int, workers: int) -> int:
    """What docs/models.md says that it takes: the trunk, experts, what is said, and each worker's expert."""
    files = of_files(str(model))
    spec = files.layers[0].spec
    squares = spec.hidden_size**2 + spec.intermediate_size**2
    experts = max(held, *(layer.nbytes for layer in files.layers))
    said = 4 * VOCABULARY * (2 * 512 + 384)
    return _BASE_BYTES + files.trunk_bytes + experts + said + workers * (16 * spec.weights + 40 * squares)


def main() -> None:
    """The measured process: source, pack, budget, held, text, workers; prints JSON, or a sentence and status 1."""
    torch.set_num_threads(1)
    source, pack, budget, held, text, workers = sys.argv[1:]
    try:
        opened = open_model(source)
        start = peak_bytes(os.getpid())
        chooser = BudgetChooser(source, opened, int(budget), Path(text), cores(), quiet=True, memory=int(held))
        peaks = []

        def choose(folder: Path) -> Any:
            chosen = chooser(folder)
            peaks.append(peak_bytes(os.getpid()))
            return chosen

        made = convert(opened, Path(pack), choose, int(workers))
    except CoordinatorError as error:
        sys.exit(str(error))
    print(
        json.dumps(
            {
                "seconds": made.seconds,
                "start_rss_bytes": start,
                "choice_peak_rss_bytes": peaks[0],
                "peak_rss_bytes": peak_bytes(os.getpid()),
            }
        )
    )


if __name__ == "__main__":
    main()
