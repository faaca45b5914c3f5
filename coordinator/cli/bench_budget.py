"""`moehive bench budget`: what a model's answers lose at a number of bits, chosen by expert and uniform."""

from dataclasses import asdict
from typing import Annotated

import typer

from .options import Json, StateDir
from .process import prepare
from .tables import show_rows


def budget(
    state_dir: StateDir,
    model: Annotated[
        str | None,
        typer.Option(help="A path or hub id.", show_default="two small random ones whose weights look trained"),
    ] = None,
    as_json: Json = False,
) -> None:
    """KL divergence at 3.0, 3.5 and 4.5 bits a weight: formats chosen for the bytes, beside the best uniform one.

    Of the experts, the trunk as it is; and once, at 3.5 bits, of the trunk's matrices as well.
    """
    prepare(verbose=False, hop=False)
    import torch

    from moehive.kernels.machine import cores

    from ..bench.budget import measure_budgets
    from .progress import stages

    torch.set_num_threads(cores())
    folder = state_dir / "bench" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    with stages(quiet=as_json) as progress:
        rows = measure_budgets(model, folder, cores(), progress)
    figures = [asdict(row) for row in rows]
    if as_json:
        show_rows(figures, as_json)
        return
    answers = [{name: row.pop(name) for name in list(row) if name.endswith("_text")} for row in figures]
    show_rows(figures, as_json)
    for row, texts in zip(rows, answers, strict=True):
        for who, text in zip(
            ("as it is", row.uniform_format, f"{row.bits} bits, chosen"), texts.values(), strict=True
        ):
            if text:
                typer.echo(f"\n{who}: {text}")
