"""`moehive bench estimate`: an estimate beside what is then measured."""

import json
import sys
from typing import Annotated, Any

import typer

from .options import Json, StateDir
from .process import prepare
from .tables import console


def estimate(
    state_dir: StateDir,
    geometry: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be given more than once.", show_default="all four")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter texts, one round.")] = False,
    as_json: Json = False,
) -> None:
    """Speed of decoding and of prompts, four shapes in two formats on this machine: as estimated, and as measured."""
    prepare(verbose=False)
    from ..bench.estimate import measure_estimate

    rows = measure_estimate(state_dir, geometry or (), quick, lambda what: print(what, file=sys.stderr))
    if as_json:
        typer.echo(json.dumps({"rows": rows}))
    else:
        _show(rows)


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(
        "model", "format", "estimated", "measured", "ratio", "trunk ms", "experts and hops ms", "prompt, tokens/s"
    )
    for row in rows:
        table.add_row(
            f"{row['geometry']}, {row['layers']} layers",
            row["format"],
            f"{row['estimated_tokens_per_s']:.1f}",
            f"{row['measured_tokens_per_s']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['estimated_trunk_ms']:.1f} / {row['measured_trunk_ms']:.1f}",
            f"{row['estimated_experts_and_hop_ms']:.1f} / {row['measured_experts_and_hop_ms']:.1f}",
            f"{row['estimated_prefill_tokens_per_s']:.0f} / {row['measured_prefill_tokens_per_s']:.0f}",
        )
    out = console()
    out.print(table)
    for name in ("layer", "hop"):
        values = sorted(row[f"fitting_{name}_s"] for row in rows)
        out.print(
            f"Fixed seconds of a {name} that would have fitted: {values[0] * 1e3:.3f} to {values[-1] * 1e3:.3f} ms, "
            f"median {values[len(values) // 2] * 1e3:.3f} ms.",
            highlight=False,
        )
