"""A hub's model onto this machine, while a person sees how far it is."""

from pathlib import Path
from typing import TYPE_CHECKING

from .progress import byte_bar

if TYPE_CHECKING:
    from ..checkpoints.hub import HubId


def download(wanted: "HubId", quiet: bool) -> Path:
    """As `hub.pull`, with one bar for all files on stderr; `quiet`: none."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from ..checkpoints.hub import pull

    disable_progress_bars()  # the hub's own, one for each file
    with byte_bar(wanted.repository, quiet) as bar:
        bar(0, None)  # while the hub is asked
        return pull(wanted, lambda file, done, total: bar(done, total, file))
