"""A hub's model onto this machine, while a person sees how far it is."""

from pathlib import Path
from typing import TYPE_CHECKING

from .progress import byte_bars

if TYPE_CHECKING:
    from ..checkpoints.hub import HubId


def download(wanted: "HubId", quiet: bool) -> Path:
    """As `hub.pull`, with one bar for all files on stderr; `quiet`: none."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from ..checkpoints.hub import pull

    disable_progress_bars()  # the hub's own, one for each file
    name = wanted.repository
    with byte_bars(disable=quiet) as bars:
        bar = bars.add_task(name, total=None)

        def show(file: str, done: int, total: int) -> None:
            bars.update(bar, description=file or name, completed=done, total=total)

        return pull(wanted, show)
