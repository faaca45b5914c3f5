"""The text that a model is calibrated with, as token ids."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import torch

from ..regular_file import check_regular
from ..types import CoordinatorError

PIECE = 512  # tokens of one text: each starts anew, as requests do
LEAST = 256  # tokens, fewer say too little
MOST = 8192  # tokens that are used


class Encoder(Protocol):
    """What is needed of a model's text."""

    async def encode(self, text: str) -> Sequence[int]:
        """Token ids."""
        ...


def calibration_text(file: Path | None) -> str:
    """The text as it is. Raises CoordinatorError for a file that can't be read."""
    try:
        if file is None:
            return (files("moehive.coordinator.precision") / "calibration.txt").read_text("utf-8")
        check_regular(file)
        return file.read_text("utf-8")
    except OSError as error:
        raise CoordinatorError(f"{file} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CoordinatorError(f"{file} is not text in UTF-8; give a text file to calibrate with.") from error


async def calibration_texts(words: Encoder, file: Path | None) -> list[torch.Tensor]:
    """int64 [up to PIECE] each, of a UTF-8 file; None: of the mixed text that comes with Moehive.

    Raises CoordinatorError for a file that can't be read or is too short.
    """
    tokens = torch.tensor(list(await words.encode(calibration_text(file)))[:MOST], dtype=torch.int64)
    if len(tokens) < LEAST:
        text = "The text that comes with Moehive" if file is None else str(file)
        raise CoordinatorError(
            f"{text} has {len(tokens)} tokens in this model's vocabulary; give a longer text as --calibration, of at "
            f"least {LEAST} tokens."
        )
    return [piece for piece in tokens.split(PIECE) if len(piece) > 1]
