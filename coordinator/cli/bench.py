"""`moehive bench …`: measurements as commands, each a table, or one JSON object with --json."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DEFAULT_ADDRESS, Address, Json, StateDir
from .tables import console, show_figures, show_rows


def load(
    model: Annotated[Path, typer.Argument(help="Directory of safetensors with config.json.", file_okay=False)],
    as_json: Json = False,
) -> None:
    """Peak memory of loading a model: the trunk, then all experts layer by layer, as they are sent to nodes."""
    from ..bench.load import measure_load

    report = measure_load(model)
    row = {
        "model": str(model),
        "trunk_bytes": report.trunk_bytes,
        "expert_bytes": report.expert_bytes,
        "layer_bytes": report.largest_layer_bytes,
        "peak_rss_bytes": report.peak_rss_bytes,
        "limit_bytes": report.limit_bytes,
        "trunk_s": report.trunk_seconds,
        "experts_s": report.experts_seconds,
    }
    show_figures(row, as_json)


def fairness(
    address: Address = DEFAULT_ADDRESS,
    rounds: Annotated[int, typer.Option(min=1, help="Short requests, alone and beside a long one each.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a short request.")] = 16,
    as_json: Json = False,
) -> None:
    """Two clients at once on a running coordinator: a short request alone, and beside a long generation."""
    from ..bench.fairness import measure_fairness

    report = measure_fairness(address, rounds, tokens)
    row = {
        "rounds": report.rounds,
        "short_tokens": report.short_tokens,
        "alone_s": report.alone_s,
        "beside_s": report.beside_s,
        "ratio": report.ratio,
        "long_tokens_per_s": report.long_tokens_per_s,
    }
    show_figures(row, as_json)


def hop(
    state_dir: StateDir,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds, and no model.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="A path or hub id, to say what hidden states in 8 bits do to its logits.",
            show_default="the demo's, once it is built",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """One layer's way to the nodes and back, beside an echo of the same bytes over TCP and over plain gRPC."""
    from rich.console import Console
    from rich.progress import Progress

    from ..bench.hop import measure_hop
    from ..bench.hop_case import summary
    from ..demo.build import is_built

    demo = state_dir / "demo" / "smollm2-135m-moe"
    if model is None and not quick and is_built(demo):
        model = str(demo)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("The hop", total=1.0)
        rows = measure_hop(quick, lambda done: progress.update(task, completed=done))
    figures: dict[str, Any] = {**summary(rows)}
    if model is not None:
        from ..bench.rounding import measure_rounding

        rounding = measure_rounding(model)
        figures |= {"kl_of_8_bits": rounding.kl, "same_choice_with_8_bits": rounding.same_choice}
    if as_json:
        typer.echo(json.dumps({"rows": [row.figures() for row in rows], "summary": figures}))
    else:
        show_rows([row.figures() for row in rows], False)
        show_figures(figures, False)


def trunk(
    quick: Annotated[
        bool, typer.Option("--quick", help="One family and shape, fewer formats and repetitions.")
    ] = False,
    as_json: Json = False,
) -> None:
    """A layer's time for one token, experts answering at once: the lean trunk beside transformers' eager layer.

    On the CPU, and on a GPU if torch has one: rows of 0 threads.
    """
    import torch

    from moehive.kernels.machine import cores

    from ..bench.trunk import measure_trunk

    rows = measure_trunk(quick, cores())
    if torch.cuda.is_available():
        from ..bench.trunk_gpu import measure_gpu_trunk

        rows += measure_gpu_trunk(quick, torch.device("cuda"))
    show_rows(rows, as_json)


def experts(
    quick: Annotated[bool, typer.Option("--quick", help="One shape, fewer batches and repetitions.")] = False,
    as_json: Json = False,
) -> None:
    """The expert MLP in every format: its share of the memory's bandwidth, and torch's bf16 beside it.

    On the CPU, and on a GPU if torch has one.
    """
    import torch

    from ..bench.experts import FULL, QUICK, measure_experts

    extent = QUICK if quick else FULL
    measured = measure_experts(extent)
    if torch.cuda.is_available():
        from ..bench.experts_gpu import measure_gpu_experts

        measured += measure_gpu_experts(extent, torch.device("cuda"))
    rows = [asdict(row) for row in measured]
    if as_json:
        typer.echo(json.dumps({"rows": rows}))
        return

    from ..bench.experts_table import experts_table

    console().print(experts_table(rows))
