"""Writes a file with random weights, a GGUF or a directory of safetensors, unless it is there."""

import os
import shutil
from pathlib import Path

from ..types import CoordinatorError
from .random_blocks import GGUF_FORMATS
from .random_gguf import write_gguf
from .random_model import RandomModel
from .random_safetensors import write_directory


def random_file(model: RandomModel, folder: Path) -> Path:
    """The file or directory in `folder`, written now unless it is there. Raises CoordinatorError for a full disk."""
    path = folder / model.file_name
    if path.exists():
        return path
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (write_gguf if model.format in GGUF_FORMATS else write_directory)(model, part)
        part.rename(path)
    except OSError as error:
        raise CoordinatorError(
            f"{path} can't be written ({error.strerror}); free some space or name another --state-dir."
        ) from error
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
    return path
