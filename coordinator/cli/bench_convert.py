"""`moehive bench convert`: how fast, in how much memory, and what kills leave behind."""

import os
from typing import Annotated

import typer

from .options import Json, StateDir
from .process import prepare
from .tables import show_rows


def convert(
    state_dir: StateDir,
    model: Annotated[
        str | None, typer.Option(help="A .gguf file or a directory of safetensors.", show_default="random ones")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Experts in work at once.")] = None,
    kills: Annotated[
        int,
        typer.Option(
            min=0,
            help="Instead: so many conversions, killed twice at random moments, a quarter of them on a full disk; "
            "with --budget, in formats that are chosen for one.",
        ),
    ] = 0,
    budget: Annotated[
        bool, typer.Option("--budget", help="Instead: the memory of a conversion within a budget, of a larger model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """A conversion beside a plain copy of the file; or what kills and full disks leave, or what a budget takes."""
    if kills:  # processes are forked, and OpenMP's threads do not live on in them
        os.environ["OMP_NUM_THREADS"] = "1"
    prepare(verbose=False, hop=False)
    from moehive.kernels.machine import cores

    from ..bench.convert import measure_convert
    from ..bench.convert_budget import measure_convert_budget
    from ..bench.convert_kills import measure_kills
    from ..bench.random_file import random_file
    from ..bench.random_model import RandomModel

    folder = state_dir / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    if budget and not kills:
        show_rows(measure_convert_budget(folder, workers or cores()), as_json)
        return
    if not kills:
        show_rows(measure_convert(folder, workers or cores(), model), as_json)
        return
    if model is None:
        wanted = RandomModel(geometry="qwen3.5-35b", format="q4_0", layers=4, experts=32)
        if budget:  # choosing takes a second or two for each expert
            wanted = RandomModel(geometry="qwen3-30b", format="bf16_safetensors", layers=1, experts=8)
        model = str(random_file(wanted, folder / "models"))
    show_rows(measure_kills(model, folder, kills, budget), as_json)
