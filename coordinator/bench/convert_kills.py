"""`moehive bench convert --kills`: conversions that run into a full disk, are killed twice, and go on to their end.

The model is kept in its format, encoded in another, and hashed in place where kernels compute in its format, in
turns; or formats are chosen for a budget (`--budget`). Every fourth conversion begins on a disk (a tmpfs) that is
full at one of the places where it writes. Kills come at random moments after a write to the journal, or while the
trunk (in place: its hashes) or the manifest is made; while formats are chosen, as the text is run, formats are
measured or the choice is written. Each run is a process forked of this one, so it must run no threads.
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
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch

from ..checkpoints.opening import ModelSource, open_model
from ..checkpoints.pack import convert as conversions
from ..checkpoints.pack.convert import KEEP, convert, wanted_pack
from ..checkpoints.pack.journal import Journal
from ..checkpoints.pack.unfinished import CHOICE, JOURNAL
from ..cli import budget as choices
from ..cli.budget import BudgetChooser
from ..estimate.headers import of_files
from ..precision import choice as choosing
from ..types import CoordinatorError
from .convert_budget import TEXT
from .small_disk import fill, small_disk

_COMMITS: Final = 16  # entries in the journal of one conversion, about
FORMATS: Final = (KEEP, "q8_0", None)  # None: in place
# Where the disk is full: before a write to an expert's file, to the journal; when the latter is made; before the
# trunk, before the manifest.
PLACES: Final = ("experts", "journal", "new journal", "trunk", "manifest")
BUDGET_PLACES: Final = ("text", "choice", *PLACES)  # before the text is run, before what was chosen is kept
_KILLED_AT: Final = ("journal",) * 4 + ("trunk", "manifest")  # drawn from
_KILLED_CHOOSING_AT: Final = ("text", "formats", "choice")  # likewise, while nothing is chosen
_MADE_BY: Final[dict[str, tuple[tuple[ModuleType, str], ...]]] = {  # functions that do it
    "text": ((choosing, "calibrate"),),
    "formats": ((choosing, "measure"),),
    "choice": ((choices, "keep_choice"),),
    "new journal": ((conversions, "Journal"),),
    "trunk": ((conversions, "write_trunk"), (conversions, "hash_source")),
    "manifest": ((conversions, "write_manifest"),),
}
_LAST_S: Final = 0.02  # of writing the manifest or the choice, and of a small trunk
_SHARE: Final = 1 / 3  # of the model's bytes, as budget

Format = str | BudgetChooser | None
Hook = Callable[[], None]


def measure_kills(model: str, folder: Path, seeds: int, budget: bool) -> list[dict[str, Any]]:
    """A row for each seed; `budget`: formats are chosen for one.

    `resumed` is what the last run found finished, `journaled` what the journal said after the second kill; `same`:
    the pack has the bytes of one that was made without a kill; `full_disk`: where there was none left, empty if this
    disk was not to be full, or may not be mounted; `refused`: the run there ended with a sentence. Raises
    CoordinatorError for a model that can't be read, or can't be served in place.
    """
    torch.set_num_threads(1)
    source = open_model(model)
    if not source.computed_as_stored and not budget:
        raise CoordinatorError(f"{model} can't be served in place, which is measured too; give another model.")
    rows = []
    with ExitStack() as stack:
        whole = Path(stack.enter_context(TemporaryDirectory(dir=folder, prefix="whole-")))
        formats: tuple[Format, ...] = (_chooser(model, source, whole / "text"),) * 3 if budget else FORMATS
        straight = {format: _straight(source, whole / _name(format), format) for format in dict.fromkeys(formats)}
        for seed in range(seeds):
            turn, kind = divmod(seed, len(formats) + 1)
            copied = kind == len(formats)
            format = formats[turn % 2 if copied else kind]
            places = BUDGET_PLACES if budget else PLACES
            full = places[turn % len(places)] if copied else ""
            with TemporaryDirectory(dir=folder, prefix="killed-") as place:
                rows.append(_Seed(source, Path(place), seed, format, straight[format], full).run())
    return rows


def _chooser(model: str, source: ModelSource, text: Path) -> BudgetChooser:
    text.write_text(TEXT[: len(TEXT) // 4])
    files = of_files(model)
    return BudgetChooser(model, source, int(_SHARE * (files.expert_bytes + files.trunk_bytes)), text, 1, quiet=True)


def _name(format: Format) -> str:
    return "budget" if isinstance(format, BudgetChooser) else format or "in place"


class _Straight(NamedTuple):
    """A conversion without a kill: its files, the time in which formats were chosen, and that of one commit."""

    contents: dict[str, bytes]
    choosing_s: float
    commit_s: float


def _straight(source: ModelSource, pack: Path, format: Format) -> _Straight:
    start = perf_counter()
    seconds = float(_forked(lambda: _convert(source, pack, format), None).split()[1])
    return _Straight(_contents(pack), perf_counter() - start - seconds, seconds / _COMMITS)


class _Seed:
    """One conversion, in a folder of its own; its disk is to be `full` there, if anywhere."""

    def __init__(
        self, source: ModelSource, folder: Path, seed: int, format: Format, straight: _Straight, full: str
    ) -> None:
        self._source = source
        self._folder = folder
        self._seed = seed
        self._draw = random.Random(seed)
        self._format = format
        self._straight = straight
        self._full = full
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
        kills, journaled = [], []
        for _ in range(2):
            place, hooks = self._kill()
            _forked(self._convert, hooks)
            kills.append(place)
            journaled.append(self._journaled())
        start = perf_counter()
        resumed = int(_forked(self._convert, None).split()[0])
        return {
            "seed": self._seed,
            "format": _name(self._format),
            "full_disk": full,
            "refused": refused,
            "first_kill": kills[0],
            "second_kill": kills[1],
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
        choosing = isinstance(self._format, BudgetChooser) and not (self._pack / CHOICE).exists()
        place = self._draw.choice(_KILLED_CHOOSING_AT * 2 + _KILLED_AT if choosing else _KILLED_AT)
        if place != "journal":
            longest = self._straight.choosing_s / 2 if place in ("text", "formats") else _LAST_S
            seconds = self._draw.random() * longest
            return place, _Hooks(place, 0, lambda: _kill_in(seconds))
        writes, seconds = self._draw.randrange(_COMMITS), self._draw.random() * self._straight.commit_s
        return f"{writes} writes", _Hooks("journal" if writes else "start", writes, lambda: _kill_in(seconds))

    def _disk_that_fills(self) -> "_Hooks":
        expert = self._source.manifest.layers[0].spec.nbytes
        most = {"experts": 2 * expert, "trunk": 4 * expert}.get(self._full, 0)
        leave, writes = int(self._draw.random() * most), self._draw.randrange(1, _COMMITS // 2)
        places = {"experts": "journal", "journal": "before journal"}
        return _Hooks(places.get(self._full, self._full), writes, lambda: fill(self._folder / "ballast", leave))

    def _journaled(self) -> int:
        """Experts that count as finished: all, once the pack is whole."""
        if not (self._pack / JOURNAL).exists():
            whole = (self._pack / "pack.msgpack").exists()
            return sum(layer.experts for layer in self._source.manifest.layers) if whole else 0
        format = self._format(self._pack) if isinstance(self._format, BudgetChooser) else self._format
        wanted = wanted_pack(self._source, self._pack, format)
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
        elif self._place in _MADE_BY:
            for module, name in _MADE_BY[self._place]:
                setattr(module, name, self._before(getattr(module, name)))
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


def _convert(source: ModelSource, pack: Path, format: Format) -> str:
    """Experts that were there already and the seconds that it took, or what was wrong."""
    if isinstance(format, BudgetChooser):
        nbytes = source.manifest.total_bytes * _SHARE
    else:
        nbytes = wanted_pack(source, pack, format).target.total_bytes
    try:
        made = convert(source, pack, format, workers=2, commit_bytes=int(nbytes / _COMMITS))
        return f"{made.resumed} {made.seconds}"
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
