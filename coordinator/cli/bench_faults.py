"""`moehive bench faults`: what each fault costs a reader, one after the other, beside its goal."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json
from .process import prepare
from .tables import console

if TYPE_CHECKING:
    from ..bench.faults_report import FaultsReport


def faults(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model, a part of the faults, each once.")] = False,
    as_json: Json = False,
) -> None:
    """Kills, stops, cuts off, throttles and restarts parts of a calm cluster: how long a reader waits each time.

    Takes some minutes. Exit code 1 when a text differed from the calm one or failed; a missed goal is none.
    """
    prepare(verbose=False)
    from ..bench.faults import measure_faults

    report = measure_faults(quick, told=lambda line: print(line, file=sys.stderr))
    if as_json:
        typer.echo(json.dumps(report.figures()))
    else:
        _show(report)
    if report.differ or report.errors:
        raise typer.Exit(1)


def _show(report: "FaultsReport") -> None:
    from rich.table import Table

    table = Table("what", "median", "worst", "times", "goal", "met", "note")
    for row in report.rows:
        figures = row.figures()
        unit = "s" if "seconds" in figures else ""
        shown = (figures.get("seconds", figures.get("ratio")), figures["worst"], figures["goal"])
        middle, worst, goal = (_number(value, unit) for value in shown)
        met = {True: "yes", False: "no", None: ""}[figures["met"]]
        table.add_row(figures["what"], middle, worst, str(figures["times"]), goal, met, figures["note"])
    out = console()
    out.print(table)
    out.print(f"{report.texts} texts, {report.differ} differed, {len(report.errors)} failed.", highlight=False)


def _number(value: Any, unit: str) -> str:
    return "" if value is None else f"{value:.3f} {unit}".rstrip()
