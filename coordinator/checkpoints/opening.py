"""A model on this machine, whatever it is: a directory of safetensors, a GGUF file, a pack."""

from pathlib import Path
from typing import TypeAlias

from ..types import CoordinatorError
from .checkpoint import Checkpoint
from .gguf.checkpoint import GgufCheckpoint
from .hub import resolve
from .outline import Outlines
from .pack.checkpoint import PackCheckpoint, is_pack
from .pack.unfinished import is_begun

ModelSource: TypeAlias = Checkpoint | GgufCheckpoint | PackCheckpoint


def open_model(model: str, outlines: Outlines | None = None) -> ModelSource:
    """Opens a path or a hub id; of the latter only what is missing here is downloaded.

    A directory or file goes by its own name, a model from a hub by its id. With `outlines`, what is kept there of
    the model is used, or is kept for the next time. Raises CoordinatorError, one sentence.
    """
    path = resolve(model)
    name = None if Path(model).expanduser().exists() else model
    if not path.is_dir():
        return GgufCheckpoint.open(path, name, outlines=outlines)
    try:
        pack, begun = is_pack(path), is_begun(path)
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}.") from error
    if pack:
        return PackCheckpoint.open(path, outlines)
    if begun:
        raise CoordinatorError(f"{path} is a pack that is not finished; run the same `moehive convert` again.")
    return Checkpoint.open(path, name, outlines=outlines)


def trunk_of(source: ModelSource) -> Checkpoint | GgufCheckpoint:
    """The checkpoint that everything but the experts comes from."""
    return source.trunk if isinstance(source, PackCheckpoint) else source
