"""`moehive bench fetch`."""

from typing import Annotated

import typer

from .options import Json, StateDir
from .process import prepare
from .tables import show_rows


def fetch(
    state_dir: StateDir,
    experts: Annotated[int, typer.Option(min=4, help="Experts of the made-up model, 9.4 MB each.")] = 112,
    quick: Annotated[bool, typer.Option("--quick", help="A model of 24 experts.")] = False,
    as_json: Json = False,
) -> None:
    """Experts on their way to nodes: a 1 Gbit/s link, loopback, three nodes with replicas, a warm restart."""
    prepare(verbose=False)
    from ..bench.fetch import measure_fetch

    show_rows(measure_fetch(state_dir, 24 if quick else experts), as_json)
