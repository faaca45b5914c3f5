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
    """KL divergence at 3.0, 3.5 and 4.5 bits a weight: formats chosen for the bytes, beside the best uniform one."""
    prepare(verbose=False, hop=False)
    import torch

    from ..bench.budget import measure_budgets
    from ..settings import cores
    from .progress import stages

    torch.set_num_threads(cores())
    folder = state_dir / "bench" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    with stages(quiet=as_json) as progress:
        rows = measure_budgets(model, folder, cores(), progress)
    show_rows([asdict(row) for row in rows], as_json)
