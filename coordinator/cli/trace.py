"""`moehive trace`: what a coordinator on this machine has recorded of its routing, as a file for the planner."""

import contextlib
import sys
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Annotated

import typer

from ..settings import SettingsError
from ..types import CoordinatorError
from .options import StateDir

if TYPE_CHECKING:
    from ..dispatch.statistics import RoutingStatistics

POLL_SECONDS = 1.0


def trace(
    state_dir: StateDir,
    export: Annotated[
        Path | None, typer.Option(help="Write what was recorded so far to this file (.npz).", dir_okay=False)
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Wait for --tokens more tokens, or Ctrl-C, then write those alone.", dir_okay=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens --record waits for.")] = 4096,
) -> None:
    """Writes a routing trace for `moehive plan`: which experts tokens were sent to, no text.

    A coordinator records by itself, the latest 20,000 tokens; this reads its files, of the model that served last.
    """
    if (export is None) == (record is None):
        raise SettingsError("Say either --export FILE.npz or --record FILE.npz.")
    found = _newest(state_dir)
    if export is not None:
        _write(_read(found), export, None)
        return
    assert record is not None
    before = _read(found).tokens
    print(f"Recording {tokens:,} tokens; Ctrl-C ends it earlier.", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        while _read(found).tokens < before + tokens:
            sleep(POLL_SECONDS)
    statistics = _read(found)
    _write(statistics, record, statistics.tokens - before)


def _newest(state_dir: Path) -> Path:
    files = [*state_dir.glob("routing-*.msgpack"), *state_dir.glob("up/*/routing-*.msgpack")]
    if not files:
        raise CoordinatorError(
            f"No coordinator has recorded anything in {state_dir} yet; let it answer some requests first."
        )
    return max(files, key=lambda file: file.stat().st_mtime)


def _read(path: Path) -> "RoutingStatistics":
    from ..dispatch.statistics import RoutingStatistics

    return RoutingStatistics.restore(path.read_bytes())


def _write(statistics: "RoutingStatistics", path: Path, latest: int | None) -> None:
    """The `latest` tokens (None: all that are kept) as a trace."""
    from ..placement.traces import Trace, save_trace

    experts, seq = statistics.trace()
    if latest is not None:
        first = max(0, len(seq) - latest)
        experts, seq = experts[:, first:], seq[first:]
    if not len(seq):
        raise CoordinatorError("No token was recorded; let the coordinator answer some requests meanwhile.")
    save_trace(Trace(experts, seq), path)
    typer.echo(f"{path} has {len(seq):,} tokens of {len(experts)} layers.")
