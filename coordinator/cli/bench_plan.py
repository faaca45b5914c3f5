"""`moehive bench plan`: the planner beside other ways to place experts, and a large network on paper."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..types import CoordinatorError
from .options import Json
from .tables import console


def plan(
    clusters: Annotated[str, typer.Option(help="Which of the made-up clusters A, B and C.")] = "ABC",
    experts: Annotated[str, typer.Option(help="Experts of a layer: 256, 512 or both.")] = "256,512",
    seed: Annotated[int, typer.Option(min=0, help="Of traces and search.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this file (SVG).", dir_okay=False)] = None,
    simulate: Annotated[
        str | None, typer.Option(help="Instead: home machines over the internet, on paper; as nodes=1000.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Expected time of a layer by the planner, EPLB, equal shares, round robin and at random, with a lower bound."""
    if simulate is not None:
        _simulate(simulate, seed, as_json)
        return
    wanted = set(clusters) - {","}
    sizes = [int(part) for part in experts.split(",") if part in ("256", "512")]
    if not wanted <= set("ABC") or not sizes or len(sizes) != len(experts.split(",")):
        raise CoordinatorError("The clusters are A, B and C, and layers have 256 or 512 experts.")
    from rich.console import Console

    from moehive.kernels.machine import cores

    from ..bench.plan import measure_plans, rows

    with Console(stderr=True).status("Planning …"):
        found = rows(measure_plans("".join(sorted(wanted)), sizes, cores(), seed))
    if plot is not None:
        from ..bench.plan_plot import plot as draw

        plot.write_text(draw(found), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"rows": found}))
    else:
        _show(found)


def _show(found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(
        "cluster", "batch", "planner", "EPLB", "equal", "robin", "random", "bound", "× ref.", "goal", "−EPLB"
    )
    for row in found:
        ways = ("planner", "EPLB", "equal_share", "round_robin", "random", "bound")
        table.add_row(
            f"{row['cluster']} {row['experts']}",
            row["batch"],
            *(f"{row[f'{way}_ms']:.3f}" for way in ways),
            f"{row['above_reference']:.3f}",
            f"{row['goal']:.2f}{'' if row['met'] else ' missed'}",
            f"{row['less_than_eplb']:.0%}",
        )
    console().print(table)


def _simulate(text: str, seed: int, as_json: bool) -> None:
    name, _, count = text.partition("=")
    if name != "nodes" or not count.isdecimal() or not 10 <= int(count) <= 100_000:
        raise CoordinatorError(f"{text[:40]!r} is not a simulation; write for example nodes=1000.")
    from ..bench.internet import simulate

    found = simulate(int(count), seed)
    if as_json:
        typer.echo(json.dumps({"rows": found}))
        return
    from rich.table import Table

    table = Table(*(key.replace("_", " ") for key in found[0]))
    for row in found:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console().print(table)
