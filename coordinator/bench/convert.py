"""`moehive bench convert`: a conversion beside a plain copy of the same file, and its peak memory.

Each conversion is a process of its own, so that its peak memory is its own. The source's pages are dropped from the
cache before each run, and both sides end with their bytes on the disk.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from ..checkpoints.opening import open_model
from ..checkpoints.pack.convert import KEEP, convert
from ..types import CoordinatorError
from .process_memory import peak_bytes
from .random_file import random_file
from .random_model import RandomModel

_ROUNDS = 3  # copies and conversions; their medians count
_PIECE = 8 << 20  # bytes copied at once
_BASE_BYTES = 10**9  # allowed beside two experts of each worker
RANDOM = (
    *((stored, KEEP) for stored in ("bf16", "q8_0", "q4_k", "q3_k", "q5_0")),  # GGUF
    *((stored, KEEP) for stored in ("bf16_safetensors", "fp8_block", "gptq", "awq", "int4_g128", "int8", "mxfp4")),
    ("bf16", "q8_0"),
)


def measure_convert(folder: Path, workers: int, model: str | None) -> list[dict[str, Any]]:
    """A row for each model (`model`, or random ones, `RANDOM`) and the format that it is turned into.

    `folder` takes the models and the packs; the latter are deleted. Raises CoordinatorError, OSError.
    """
    if model is not None:
        return [measure_one(model, KEEP, folder, workers)]
    return [measure_one(str(_random(folder, stored)), format, folder, workers) for stored, format in RANDOM]


def _random(folder: Path, format: str) -> Path:
    wanted = RandomModel(geometry="qwen3-30b", format=format, layers=2, experts=64)
    return random_file(wanted, folder / "models")


def measure_one(model: str, format: str, folder: Path, workers: int) -> dict[str, Any]:
    """One model into `format`. Raises CoordinatorError, OSError."""
    path = Path(model)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    nbytes = sum(file.stat().st_size for file in files)
    copies, runs = [], []
    for _ in range(_ROUNDS):  # in turns: a shared disk's speed changes from minute to minute
        copies.append(_timed_copy(files, folder))
        runs.append(timed_convert(model, format, files, folder, workers))
    made = runs[0]
    seconds = statistics.median(run["seconds"] for run in runs)
    written = made["expert_bytes"] + made["trunk_bytes"]
    copy_rate, rate = nbytes / statistics.median(copies), written / seconds
    limit = 2 * workers * made["largest_expert_bytes"] + _BASE_BYTES
    peak = max(run["peak_rss_bytes"] for run in runs)
    return {
        "model": path.name,
        "format": format,
        "workers": workers,
        "bytes": written,
        "seconds": seconds,
        "bytes_per_s": rate,
        "copy_bytes_per_s": copy_rate,
        "share_of_copy": rate / copy_rate,
        "peak_rss_bytes": peak,
        "start_rss_bytes": max(run["start_rss_bytes"] for run in runs),
        "limit_bytes": limit,
        "within_limit": peak <= limit,
    }


def _timed_copy(files: list[Path], folder: Path) -> float:
    with TemporaryDirectory(dir=folder, prefix="copy-") as copies:
        _forget(files)
        start = perf_counter()
        for file in files:
            _copy(file, Path(copies) / file.name)
        return perf_counter() - start


def timed_convert(model: str, format: str, files: list[Path], folder: Path, workers: int) -> dict[str, Any]:
    """What a conversion in a process of its own says, see `main`. Raises CoordinatorError."""
    with TemporaryDirectory(dir=folder, prefix="pack-") as packs:
        _forget(files)
        command = [sys.executable, "-m", "moehive.coordinator.bench.convert"]
        command += [model, f"{packs}/pack", format, str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CoordinatorError((done.stderr.strip().splitlines() or ["The conversion failed."])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file, target.open("wb") as out:
        shutil.copyfileobj(file, out, _PIECE)
        out.flush()
        os.fsync(out.fileno())


def _forget(files: list[Path]) -> None:
    """Drops files' clean pages from the cache, so that they are read from the disk."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """The measured process: source, pack, format, workers; prints JSON, or a sentence on stderr and status 1."""
    torch.set_num_threads(1)
    try:
        source = open_model(sys.argv[1])
        start = peak_bytes(os.getpid())
        made = convert(source, Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    except CoordinatorError as error:
        sys.exit(str(error))
    print(
        json.dumps(
            {
                "seconds": made.seconds,
                "expert_bytes": made.expert_bytes,
                "trunk_bytes": made.trunk_bytes,
                "largest_expert_bytes": max(
                    layer.largest_bytes for manifest in (source.manifest, made.manifest) for layer in manifest.layers
                ),
                "start_rss_bytes": start,
                "peak_rss_bytes": peak_bytes(os.getpid()),
            }
        )
    )


if __name__ == "__main__":
    main()
