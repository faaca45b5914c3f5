"""`moehive estimate`: whether a model would run here, and how fast, before anything of it is downloaded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..sizes import in_bytes, in_count, in_digits
from .options import Json

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from ..estimate.estimate import Estimate
    from ..estimate.model import Model


def estimate(
    model: Annotated[
        str,
        typer.Argument(help="Hub id (org/name), a name of the built-in table, a .gguf file, a directory, or a pack."),
    ],
    cluster: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="cluster.toml; `moehive status --cluster-file FILE` writes one.",
            show_default="this machine",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Bytes for the whole model, as 120GB, or 'cluster': what `moehive convert --budget` would fill.",
            show_default="none: one format for all",
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Of the weights, as q4_k.", show_default="the best that fits")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bytes, who would hold what, tokens a second, time to load, and what would help most. Reads no weights.

    Of a hub id it downloads config.json and the headers of its files; without a network, the built-in table answers.
    """
    from ..estimate.cluster import read_cluster
    from ..estimate.estimate import estimate as run
    from ..estimate.holding import room_for_weights
    from ..estimate.this_machine import this_machine
    from ..precision.candidates import CANDIDATES
    from ..settings import parse_size

    machines = read_cluster(cluster) if cluster is not None else this_machine()
    models = _models(model)
    limit = None
    if budget is not None:
        stored = next(iter(models.values()))  # as a conversion counts: its experts are the largest
        limit = room_for_weights(stored, machines) if budget == "cluster" else parse_size(budget)
    found = run(models, machines, limit, format, CANDIDATES)
    if as_json:
        typer.echo(json.dumps(found.row()))
    else:
        _show(found)


def _models(model: str) -> "dict[str, Model]":
    """The model in each format that it is to be had in."""
    from ..estimate.estimate import in_all_formats
    from ..estimate.geometries import find_shape
    from ..estimate.headers import of_files, of_hub
    from ..estimate.model import of_shape
    from ..types import CoordinatorError

    if Path(model).expanduser().exists():
        return _and_smaller(of_files(model))
    known = find_shape(model)
    in_table = {} if known is None else in_all_formats(of_shape(model, known[1], "bf16"))
    if in_table and "/" not in model:
        return in_table
    try:
        return _and_smaller(of_hub(model))
    except CoordinatorError as error:
        if known is None:
            raise
        typer.echo(f"{error} What follows is {known[0]} of the built-in table, in every format.", err=True)
        return in_table


def _and_smaller(stored: "Model") -> "dict[str, Model]":
    """As it is stored, and in the formats that a conversion would make smaller."""
    from ..estimate.estimate import in_all_formats

    smaller = {f: m for f, m in in_all_formats(stored).items() if m.total_bytes < stored.total_bytes}
    return {stored.format: stored} | smaller


def _show(found: "Estimate") -> None:
    from .tables import console

    out = console()
    for sentence in _sentences(found):
        out.print(sentence, soft_wrap=True)
    for table in _tables(found):
        out.print(table)


def _sentences(found: "Estimate") -> "Iterator[Text]":
    from rich.text import Text

    model, step = found.model, found.step
    fits = "fits" if found.fits else "does not fit"
    yield Text.assemble(
        (model.name, "bold"),
        f" in {model.format} {fits}: {in_count(model.weights)} weights "
        f"({in_count(model.active_weights)} a token), {_size(model.total_bytes)}",
    )
    if model.mixture:
        mixture = " and ".join(f"{share:.0%} in {name}" for name, share in model.mixture)
        yield Text(f"It fills the budget with {mixture}, for what `moehive convert --budget` chooses part by part.")
    for warning in found.warnings:
        yield Text.assemble(("Mind:", "bold"), f" {warning}")
    yield Text.assemble(
        "About ",
        (f"{in_digits(found.decode_tokens_per_s)} tokens/s", "bold"),
        f" (a token: trunk {step.trunk_s * 1e3:.3g} ms, experts {step.experts_s * 1e3:.3g} ms, "
        f"hops {step.hop_s * 1e3:.3g} ms); prompts {in_digits(found.prefill_tokens_per_s)} tokens/s; "
        f"loaded in {_time(found.load_s)}.",
    )


def _tables(found: "Estimate") -> "Iterator[Table]":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    parts = Table("part", "bytes", box=SIMPLE_HEAD)
    for part, nbytes in {**found.model.part_bytes(), "routed experts": found.model.expert_bytes}.items():
        if nbytes:
            parts.add_row(part, _size(nbytes))
    yield parts
    nodes = Table("machine", "trunk and cache", "in RAM", "on disk", "of those, on a GPU too", box=SIMPLE_HEAD)
    for holding in found.placed.holdings:
        trunk = holding.trunk_bytes + holding.kv_bytes
        tiers = holding.ram_bytes, holding.disk_bytes, holding.vram_bytes
        nodes.add_row(holding.machine.name, _size(trunk), *map(_size, tiers))
    yield nodes
    formats = Table("format", "bytes", "", box=SIMPLE_HEAD)
    for size in found.formats:
        where = (
            "does not fit" if not size.fits else f"{_size(size.read_bytes)} on disk" if size.read_bytes else "fits"
        )
        formats.add_row(size.format, _size(size.total_bytes), where)
    yield formats
    advice = Table("what would help", "tokens/s", "", box=SIMPLE_HEAD)
    for one in found.advice:
        advice.add_row(one.what, in_digits(one.decode_tokens_per_s), "" if one.fits else "still does not fit")
    if found.advice:
        yield advice


def _size(nbytes: float) -> str:
    return in_bytes(nbytes) if nbytes else ""


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
