"""Figures as tables that can be read in a terminal of any width, in a file and in a pipe; or as JSON."""

import json
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 10_000  # where no terminal says how wide it is: no line is so long, so none is wrapped or cut


def console() -> "Console":
    """Of stdout. Names of models, machines and files are shown as they are, also where brackets are in them."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False)


def show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A row for each measurement, a column for each figure; rows of other figures than those above begin anew."""
    if as_json:
        typer.echo(json.dumps({"rows": rows}))
        return
    from rich.table import Column, Table

    for names, some in groupby(rows, key=tuple):
        table = Table(*(Column(name.replace("_", " "), overflow="fold") for name in names))
        for row in some:
            table.add_row(*(_words(value) for value in row.values()))
        console().print(table)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.2f}" if abs(value) < 10 else f"{value:,.0f}"


def show_figures(figures: dict[str, Any], as_json: bool) -> None:
    """One measurement, a line for each figure."""
    if as_json:
        typer.echo(json.dumps({"rows": [figures]}))
        return
    from rich.table import Table

    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,.3f}" if isinstance(value, float) else _words(value))
    console().print(table)
