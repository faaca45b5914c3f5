"""`moehive bench convert --kills`: conversions that run into a full disk, are killed twice, and go on to their end.

The model is kept in its format, encoded in another, and hashed in place where kernels compute in its format, in
turns. Every fourth copy begins on a disk (a tmpfs) that is full at one of the places where a conversion writes. Kills
come at random moments after a write to the journal, or while the trunk (in place: its hashes) or the manifest is
made. Each run is a process forked of this one, so it must run no threads.
"""

import os
import random
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from time import perf_counter
from traceback import print_exc
from typing import Any, Final, NamedTuple

import torch

from ..checkpoints.opening import ModelSource, open_model
from ..checkpoints.pack import convert as conversions
from ..checkpoints.pack.convert import KEEP, convert, wanted_pack
from ..checkpoints.pack.journal import Journal
from ..checkpoints.pack.unfinished import JOURNAL
from ..types import CoordinatorError
from .small_disk import fill, small_disk

_COMMITS: Final = 16  # entries in the journal of one conversion, about
FORMATS: Final = (KEEP, "q8_0", None)  # None: in place
# Where the disk is full: before a write to an expert's file, to the journal; when the latter is made; before the
# trunk, before the manifest.
PLACES: Final = ("experts", "journal", "new journal", "trunk", "manifest")
_KILLED_AT: Final = ("journal",) * 4 + ("trunk", "manifest")  # drawn from
_MADE_BY: Final = {"trunk": ("write_trunk", "hash_source"), "manifest": ("write_manifest",)}  # in convert.py
_LAST_S: Final = 0.02  # of writing the manifest, and of a small trunk

Hook = Callable[[], None]


def measure_kills(model: str, folder: Path, seeds: int) -> list[dict[str, Any]]:
    """A row for each seed.

    `resumed` is what the last run found finished, `journaled` what the journal said after the second kill; `same`:
    the pack has the bytes of one that was made without a kill; `full_disk`: where there was none left, empty if this
    disk was not to be full, or may not be mounted; `refused`: the run there ended with a sentence. Raises
    CoordinatorError for a model that can't be read, or can't be served in place.
    """
    torch.set_num_threads(1)
    source = open_model(model)
    if not source.computed_as_stored:
        raise CoordinatorError(f"{model} can't be served in place, which is measured too; give another model.")
    rows = []
    with ExitStack() as stack:
        whole = Path(stack.enter_context(TemporaryDirectory(dir=folder, prefix="whole-")))
        straight = {format: _straight(source, whole / str(format), format) for format in FORMATS}
        for seed in range(seeds):
            with TemporaryDirectory(dir=folder, prefix="killed-") as place:
                rows.append(_Seed(source, Path(place), seed, straight).run())
    return rows


class _Straight(NamedTuple):
    """A conversion without a kill: its files, and how long it took between two entries in the journal."""

    contents: dict[str, bytes]
    commit_s: float


def _straight(source: ModelSource, pack: Path, format: str | None) -> _Straight:
    start = perf_counter()
    _forked(lambda: _convert(source, pack, format), None)
    return _Straight(_contents(pack), (perf_counter() - start) / _COMMITS)


class _Seed:
    """One conversion, in a folder of its own."""

    def __init__(self, source: ModelSource, folder: Path, seed: int, straight: dict[str | None, _Straight]) -> None:
        self._source = source
        self._folder = folder
        self._seed = seed
        self._draw = random.Random(seed)
        turn, kind = divmod(seed, len(FORMATS) + 1)
        copied = kind == len(FORMATS)
        self._format = FORMATS[turn % 2 if copied else kind]
        self._straight = straight[self._format]
        self._full = PLACES[turn % len(PLACES)] if copied else ""
        self._pack = folder / "pack"

    def run(self) -> dict[str, Any]:
        """The row."""
        if not self._full:
            return self._row("", False)
        nbytes = 2 * sum(map(len, self._straight.contents.values()))
        with small_disk(self._folder, nbytes + (1 << 20)) as mounted:
            if not mounted:
                return self._row("", False)
            said = _forked(self._convert, self._disk_that_fills())
            (self._folder / "ballast").unlink()
            return self._row(self._full, "can't be written" in said)

    def _row(self, full: str, refused: bool) -> dict[str, Any]:
        # By what was done so far, not by the clock: on a busy machine a moment drawn beforehand misses the work.
        kills = [self._kill(), self._kill()]
        journaled = []
        for _, hooks in kills:
            _forked(self._convert, hooks)
            journaled.append(self._journaled())
        start = perf_counter()
        resumed = int(_forked(self._convert, None))
        return {
            "seed": self._seed,
            "format": self._format or "in place",
            "full_disk": full,
            "refused": refused,
            "first_kill": kills[0][0],
            "second_kill": kills[1][0],
            "journaled_first": journaled[0],
            "journaled": journaled[1],
            "resumed": resumed,
            "experts": sum(layer.experts for layer in self._source.manifest.layers),
            "last_run_s": perf_counter() - start,
            "same": _contents(self._pack) == self._straight.contents,
        }

    def _convert(self) -> str:
        return _convert(self._source, self._pack, self._format)

    def _kill(self) -> tuple[str, "_Hooks"]:
        place = self._draw.choice(_KILLED_AT)
        if place != "journal":
            seconds = self._draw.random() * _LAST_S
            return place, _Hooks(place, 0, lambda: _kill_in(seconds))
        writes, seconds = self._draw.randrange(_COMMITS), self._draw.random() * self._straight.commit_s
        return f"{writes} writes", _Hooks("journal" if writes else "start", writes, lambda: _kill_in(seconds))

    def _disk_that_fills(self) -> "_Hooks":
        expert = self._source.manifest.layers[0].spec.nbytes
        most = {"experts": 2 * expert, "trunk": 4 * expert}.get(self._full, 0)
        leave, writes = int(self._draw.random() * most), self._draw.randrange(1, _COMMITS // 2)
        places = {"experts": "journal", "journal": "before journal", "new journal": "start"}
        return _Hooks(places.get(self._full, self._full), writes, lambda: fill(self._folder / "ballast", leave))

    def _journaled(self) -> int:
        """Experts that count as finished: all, once the pack is whole."""
        if not (self._pack / JOURNAL).exists():
            whole = (self._pack / "pack.msgpack").exists()
            return sum(layer.experts for layer in self._source.manifest.layers) if whole else 0
        wanted = wanted_pack(self._source, self._pack, self._format)
        journal = Journal(self._pack, wanted.identity, wanted.target)
        journal.close()
        return len(journal.finished)


class _Hooks:
    """What is to happen in a process, and where: at the start, after so many writes to the journal, before others."""

    def __init__(self, place: str, writes: int, happen: Hook) -> None:
        self._place, self._left, self._happen = place, writes, happen

    def set(self) -> None:
        """In this process, for good. Who looks from outside may look too late."""
        if self._place == "start":
            self._happen()
        elif self._place in ("trunk", "manifest"):
            for name in _MADE_BY[self._place]:
                setattr(conversions, name, self._before(getattr(conversions, name)))
        else:
            append = Journal.append
            counted = self._counted(append)
            Journal.append = counted  # type: ignore[method-assign]

    def _before(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*arguments: Any) -> Any:
            self._happen()
            return write(*arguments)

        return hooked

    def _counted(self, append: Callable[..., None]) -> Callable[..., None]:
        def hooked(*arguments: Any) -> None:
            self._left -= 1
            if self._left == 0 and self._place == "before journal":
                self._happen()
            append(*arguments)
            if self._left == 0 and self._place == "journal":
                self._happen()

        return hooked


def _kill_in(seconds: float) -> None:
    timer = Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _convert(source: ModelSource, pack: Path, format: str | None) -> str:
    """Experts that were there already, or what was wrong."""
    commit_bytes = wanted_pack(source, pack, format).target.total_bytes // _COMMITS
    try:
        return str(convert(source, pack, format, workers=2, commit_bytes=commit_bytes).resumed)
    except CoordinatorError as error:
        return str(error)


def _forked(work: Callable[[], str], hooks: _Hooks | None) -> str:
    """What `work` returns in a process of its own; nothing if it was killed before."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:  # never leaves this block
        status = 1
        try:
            os.close(readable)
            torch.set_num_threads(1)  # makes torch's pool anew, which two workers at once would trip over
            if hooks is not None:
                hooks.set()
            os.write(writable, work().encode())
            status = 0
        except Exception:  # a fault of ours, which this process can't raise where it would be seen
            print_exc()
        finally:
            os._exit(status)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        said = pipe.read()
    _, code = os.waitpid(pid, 0)
    if code != 0 and (hooks is None or code != signal.SIGKILL):
        raise CoordinatorError(f"The conversion in a process of its own failed with status {code}.")
    return said


def _contents(pack: Path) -> dict[str, bytes]:
    return {str(file.relative_to(pack)): file.read_bytes() for file in sorted(pack.rglob("*")) if file.is_file()}
