"""A model that was downloaded may hold links to whatever else this user can read: none may lead out of it."""

from collections.abc import Iterable
from pathlib import Path

from ..types import CoordinatorError


def refuse_links_out(files: Iterable[Path], inside: Iterable[Path], what: str) -> None:
    """Raises CoordinatorError, with `what` they lead out of, for files that do not lie below one of some folders."""
    folders = [folder.resolve() for folder in inside]
    for file in files:
        try:
            real = file.resolve()
        except OSError as error:
            raise CoordinatorError(f"{file} cannot be read: {error.strerror}.") from error
        except RuntimeError as error:  # links in a circle, as older Pythons say it
            raise CoordinatorError(f"{file} is a link that leads in a circle.") from error
        if not any(real.is_relative_to(folder) for folder in folders):
            raise CoordinatorError(f"{file} is a link that leads out of {what}; put the file itself there.")
