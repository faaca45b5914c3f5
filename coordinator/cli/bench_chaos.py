"""`moehive bench chaos`: faults on a real cluster, and a verdict. `moehive bench dispatch`: a layer's choices."""

import json
import sys
from typing import Annotated

import typer

from .options import Json, StateDir
from .process import prepare
from .tables import show_figures, show_rows


def chaos(
    seed: Annotated[int, typer.Option(min=0, help="Draws the faults: the same seed, the same ones.")] = 1,
    minutes: Annotated[float, typer.Option(min=0.05, help="How long faults go on; fractions are fine.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Kills, stops, cuts off, slows down and corrupts nodes under load, kills the coordinator, and compares answers.

    Every answer must be a calm run's. Exit code 1 when one differed, a token was lost or repeated, a request failed,
    a process ended by itself, or something leaked.
    """
    from ..bench.chaos import run_chaos

    report = run_chaos(seed, minutes, told=lambda line: print(line, file=sys.stderr))
    figures = report.figures()
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        show_figures(figures, False)
    if not report.passed:
        raise typer.Exit(1)


def dispatch(state_dir: StateDir, as_json: Json = False) -> None:
    """What choosing among replicas, splitting and noting cost a layer, and how much slower a choice by chance is."""
    from ..bench.dispatch import measure_dispatch, measure_statistics

    prepare(verbose=False)
    show_rows(measure_dispatch() + measure_statistics(state_dir), as_json)
