"""`moehive bench chaos`: faults on a real cluster, and a verdict. `moehive bench dispatch`: choosing a replica."""

import json
import sys
from typing import Annotated

import typer

from .options import Json
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


def dispatch(as_json: Json = False) -> None:
    """Choosing among replicas: what it costs for a layer, and how much slower a choice by chance would be."""
    from ..bench.dispatch import measure_dispatch

    show_rows(measure_dispatch(), as_json)
