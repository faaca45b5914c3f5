"""`moehive plan`: where the experts of a model should lie, from a routing trace and a description of the cluster."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json

if TYPE_CHECKING:
    from ..placement.explain import Explanation
    from ..placement.plan import Placement


def plan(
    trace: Annotated[
        Path, typer.Option(help="Routing trace (.npz), as `moehive trace --export` writes it.", dir_okay=False)
    ],
    cluster: Annotated[Path, typer.Option(help="The cluster's nodes and figures (JSON).", dir_okay=False)],
    batch: Annotated[
        str, typer.Option(help="Kinds of batches that are served: tokens decoded at once; p256 is a prefill chunk.")
    ] = "1,4,16",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this file (JSON).", dir_okay=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same plan.")] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why, and what one more machine would bring.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Places experts so that a layer's expected time is least, and says what no plan could go below."""
    from rich.console import Console

    from moehive.kernels.machine import cores

    from ..placement.cluster import read_cluster
    from ..placement.explain import explain as in_words
    from ..placement.plan import make_plan
    from ..placement.plan_file import plan_json, write_json
    from ..placement.traces import parse_mixes, read_trace

    mixes = parse_mixes(batch)
    known, routed = read_cluster(cluster), read_trace(trace)
    with Console(stderr=True).status(f"Planning {routed.layers} layers for {len(known.nodes)} nodes …"):
        made = make_plan(known, routed, mixes, seed, cores())
        words = in_words(made, routed) if explain else None
    found = plan_json(made)
    if output is not None:
        write_json(found, output)
    if as_json:
        if words is not None:
            found["explanation"] = _words_json(words)
        typer.echo(json.dumps(found))
        return
    _show(made, found, words)


def _words_json(words: "Explanation") -> dict[str, Any]:
    return {
        "nodes": words.nodes,
        "waits": words.waits,
        "warnings": list(words.warnings),
        "more": list(words.more),
    }


def _show(made: "Placement", found: dict[str, Any], words: "Explanation | None") -> None:
    from rich.table import Table

    from .tables import console

    out = console()
    table = Table("batch", "expected ms a layer", "bound ms", "above it", "bound, same slots", "above it")
    layers = len(made.replicas)
    for name, row in found["batches"].items():
        expected = row["expected_s"]
        cells = [name, f"{1e3 * expected / layers:.4f}"]
        for bound in (row["bound_s"], row["bound_same_slots_s"]):
            cells += [f"{1e3 * bound / layers:.4f}", f"{expected / bound - 1:.1%}"]
        table.add_row(*cells)
    out.print(table)
    if words is None:
        return
    for name, sentence in words.nodes.items():
        out.print(f"{name} {sentence}")
    for sentence in (words.waits, *words.warnings, *words.more):
        out.print(sentence)
