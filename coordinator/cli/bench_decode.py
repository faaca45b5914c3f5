"""`moehive bench decode`: a whole cluster on this machine, from the prompt to the tokens."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings import SettingsError
from .options import Json, StateDir
from .process import prepare

if TYPE_CHECKING:
    from ..bench.slow_link import LinkSpeed

_LINK = re.compile(r"(\d+(?:\.\d+)?)ms,(\d+(?:\.\d+)?)gbit", re.IGNORECASE)


def decode(
    state_dir: StateDir,
    geometry: Annotated[
        str | None,
        typer.Option(help="Random weights of this model's shapes: qwen3.5-35b, qwen3.5-397b, qwen3-30b, kimi-k2."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the geometry.", show_default="all")] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="In each layer; fewer fit, and as many are used.", show_default="all")
    ] = None,
    weights: Annotated[
        str, typer.Option("--format", help="Of the random weights, as q4_0, q4_k, fp8_block, int4_g128.")
    ] = "q4_0",
    model: Annotated[
        Path | None,
        typer.Option(exists=True, help="A GGUF file or a directory of safetensors, instead of a geometry."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Expert node processes.")] = 2,
    threads_per_node: Annotated[int, typer.Option(min=1, help="That compute experts.")] = 1,
    trunk_threads: Annotated[
        int | None, typer.Option(min=1, help="That compute the trunk.", show_default="all cores")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(help="A made-up link to each node, as 0.25ms,1gbit (each way).", show_default="loopback"),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that each request generates.")] = 64,
    sequences: Annotated[int, typer.Option(min=1, max=64, help="Requests at once.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Requests one after the other; their medians count.")] = 3,
    timeline: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a Chrome trace of one more request; Perfetto opens it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokens a second of a whole cluster on this machine, where the time goes, and what memory alone would allow."""
    if (geometry is None) == (model is None):
        raise SettingsError("Say either --geometry or --model.")
    prepare(verbose=False)
    speed = None if link is None else parse_link(link)
    if model is None:
        from ..bench.random_file import random_file
        from ..bench.random_model import RandomModel

        assert geometry is not None
        wanted = RandomModel(geometry=geometry, format=weights, layers=layers, experts=experts)
        model = random_file(wanted, state_dir / "bench" / "models")
    from ..bench.decode import DecodeSettings, measure_decode

    row = asdict(
        measure_decode(
            DecodeSettings(
                model=model,
                state_dir=state_dir,
                nodes=nodes,
                threads_per_node=threads_per_node,
                trunk_threads=trunk_threads,
                link=speed,
                prompt=prompt,
                tokens=tokens,
                sequences=sequences,
                rounds=rounds,
                timeline=timeline,
            )
        )
    )
    if as_json:
        typer.echo(json.dumps({"rows": [row]}))
    else:
        _show(row)


def parse_link(text: str) -> "LinkSpeed":
    """A link as a person writes it: milliseconds one way, Gbit/s in each direction. Raises SettingsError."""
    from ..bench.slow_link import LinkSpeed

    match = _LINK.fullmatch(text.replace(" ", ""))
    if match is None or float(match[2]) == 0:
        raise SettingsError(f"{text[:40]!r} is not a link; write for example 0.25ms,1gbit.")
    return LinkSpeed(delay_s=float(match[1]) / 1e3, bits_per_s=float(match[2]) * 1e9)


def _show(row: dict[str, Any]) -> None:
    from rich.table import Table

    from .tables import console

    table = Table("figure", "value")
    for name, value in row.items():
        if name.endswith("_share"):
            shown = f"{value:.0%}"
        elif name.endswith("_bytes"):
            shown = f"{value / 1e6:,.1f} MB"
        elif name == "read_bandwidth":
            shown = f"{value / 1e9:.1f} GB/s"
        else:
            shown = f"{value:,.2f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    console().print(table)
