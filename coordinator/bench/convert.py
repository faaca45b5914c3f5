"""`moehive bench convert`: a conversion beside a plain copy of the same file, its peak memory, and kills.

Each conversion is a process of its own, so that its peak memory is its own. The source's pages are dropped from the
cache before each run, and both sides end with their bytes on the disk.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from time import perf_counter
from typing import Any, NamedTuple

import torch

from moehive.kernels.geometry import ExpertId

from ..checkpoints.opening import ModelSource, open_model
from ..checkpoints.pack.convert import KEEP, convert
from ..checkpoints.pack.journal import Journal
from ..checkpoints.pack.manifest import identity_of
from ..checkpoints.pack.unfinished import JOURNAL
from ..types import CoordinatorError
from .decode import peak_bytes
from .random_model import RandomModel, random_model

_ROUNDS = 3  # copies and conversions; their medians count
_PIECE = 8 << 20  # bytes copied at once
_BASE_BYTES = 10**9  # allowed beside two experts of each worker
_COMMITS = 16  # entries in the journal of one conversion that is to be killed, about
FORMATS = ("bf16", "q8_0", "q4_k")  # of the random models


def measure_convert(folder: Path, workers: int, model: str | None) -> list[dict[str, Any]]:
    """A row for each model (`model`, or random ones in three formats), kept in its format.

    `folder` takes the models and the packs; the latter are deleted. Raises CoordinatorError, OSError.
    """
    models = [model] if model is not None else [str(_random(folder, format)) for format in FORMATS]
    return [_measure(source, folder, workers) for source in models]


def _random(folder: Path, format: str) -> Path:
    wanted = RandomModel(geometry="qwen3-30b", format=format, layers=2, experts=64)
    return random_model(wanted, folder / "models")


def _measure(model: str, folder: Path, workers: int) -> dict[str, Any]:
    path = Path(model)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    nbytes = sum(file.stat().st_size for file in files)
    copies, runs = [], []
    for _ in range(_ROUNDS):  # in turns: a shared disk's speed changes from minute to minute
        copies.append(_timed_copy(files, folder))
        runs.append(_timed_convert(model, files, folder, workers))
    made = runs[0]
    seconds = statistics.median(run["seconds"] for run in runs)
    written = made["expert_bytes"] + made["trunk_bytes"]
    copy_rate, rate = nbytes / statistics.median(copies), written / seconds
    limit = 2 * workers * made["largest_expert_bytes"] + _BASE_BYTES
    peak = max(run["peak_rss_bytes"] for run in runs)
    return {
        "model": path.name,
        "workers": workers,
        "bytes": written,
        "seconds": seconds,
        "bytes_per_s": rate,
        "copy_bytes_per_s": copy_rate,
        "share_of_copy": rate / copy_rate,
        "peak_rss_bytes": peak,
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


def _timed_convert(model: str, files: list[Path], folder: Path, workers: int) -> dict[str, Any]:
    with TemporaryDirectory(dir=folder, prefix="pack-") as packs:
        _forget(files)
        command = [sys.executable, "-m", "moehive.coordinator.bench.convert", model, f"{packs}/pack", str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CoordinatorError((done.stderr.strip().splitlines() or ["The conversion failed."])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_kills(model: str, folder: Path, seeds: int, format: str = KEEP) -> list[dict[str, Any]]:
    """For each seed a conversion that is killed twice at random moments, then goes on to its end.

    `resumed` is what the last run found finished, `journaled` what the journal said after the second kill; `same`:
    the pack has the bytes of one that was made without a kill. Processes are forked of this one, so it must run no
    threads. Raises CoordinatorError for a model that can't be read.
    """
    torch.set_num_threads(1)
    source = open_model(model)
    with ExitStack() as stack:
        whole = Path(stack.enter_context(TemporaryDirectory(dir=folder, prefix="whole-")))
        start = perf_counter()
        _forked(partial(_convert, source, whole / "pack", format), None)
        commit_s = (perf_counter() - start) / _COMMITS
        wanted = _contents(whole / "pack")
        rows = []
        for seed in range(seeds):
            with TemporaryDirectory(dir=folder, prefix="killed-") as killed:
                rows.append(_kill(source, Path(killed) / "pack", format, seed, commit_s, wanted))
    return rows


def _kill(
    source: ModelSource, pack: Path, format: str, seed: int, commit_s: float, wanted: dict[str, bytes]
) -> dict[str, Any]:
    draw = random.Random(seed)
    # By what was done so far, not by the clock: on a busy machine a moment drawn beforehand misses the work.
    moments = [_Moment(draw.randrange(_COMMITS), draw.random() * commit_s) for _ in range(2)]
    journaled = []
    for moment in moments:
        _forked(lambda: _convert(source, pack, format), moment)
        journaled.append(_journaled(source, pack))
    start = perf_counter()
    resumed = int(_forked(lambda: _convert(source, pack, format), None))
    return {
        "seed": seed,
        "first_kill": moments[0].writes,
        "second_kill": moments[1].writes,
        "journaled_first": journaled[0],
        "journaled": journaled[1],
        "resumed": resumed,
        "experts": sum(layer.experts for layer in source.manifest.layers),
        "last_run_s": perf_counter() - start,
        "same": _contents(pack) == wanted,
    }


class _Moment(NamedTuple):
    """When a conversion is killed: so long after so many writes to its journal."""

    writes: int
    seconds: float

    def await_in_this_process(self) -> None:
        """Has this process killed then, unless it has ended. A process that looks from outside may look too late."""
        append, left = Journal.append, self.writes

        def count(journal: Journal, done: Iterable[tuple[ExpertId, bytes]]) -> None:
            nonlocal left
            append(journal, done)
            left -= 1
            if left == 0:
                self._begin()

        if left == 0:
            self._begin()
        else:
            Journal.append = count  # type: ignore[method-assign, assignment]

    def _begin(self) -> None:
        timer = Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()


def _convert(source: ModelSource, pack: Path, format: str) -> str:
    return str(convert(source, pack, format, workers=2, commit_bytes=source.manifest.total_bytes // _COMMITS).resumed)


def _forked(work: "Callable[[], str]", killed: _Moment | None) -> str:
    """What `work` returns in a process of its own; nothing if it was `killed` before."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:  # never leaves this block
        status = 1
        try:
            os.close(readable)
            if killed is not None:
                killed.await_in_this_process()
            os.write(writable, work().encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        said = pipe.read()
    _, code = os.waitpid(pid, 0)
    if code != 0 and (killed is None or code != signal.SIGKILL):
        raise CoordinatorError(f"The conversion in a process of its own failed with status {code}.")
    return said


def _journaled(source: ModelSource, pack: Path) -> int:
    """Experts that count as finished: all, once the pack is whole."""
    if not (pack / JOURNAL).exists():
        return sum(layer.experts for layer in source.manifest.layers) if (pack / "pack.msgpack").exists() else 0
    journal = Journal(pack, identity_of(source.manifest, source.manifest, False), source.manifest)
    journal.close()
    return len(journal.finished)


def _contents(pack: Path) -> dict[str, bytes]:
    return {str(file.relative_to(pack)): file.read_bytes() for file in sorted(pack.rglob("*")) if file.is_file()}


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
    """The measured process: source, pack, workers; prints JSON, or a sentence on stderr and status 1."""
    torch.set_num_threads(1)
    try:
        source = open_model(sys.argv[1])
        made = convert(source, Path(sys.argv[2]), KEEP, int(sys.argv[3]))
    except CoordinatorError as error:
        sys.exit(str(error))
    print(
        json.dumps(
            {
                "seconds": made.seconds,
                "expert_bytes": made.expert_bytes,
                "trunk_bytes": made.trunk_bytes,
                "largest_expert_bytes": max(layer.spec.nbytes for layer in made.manifest.layers),
                "peak_rss_bytes": peak_bytes(os.getpid()),
            }
        )
    )


if __name__ == "__main__":
    main()
