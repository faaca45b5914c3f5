"""The coordinator's own native libraries, by ctypes."""

import ctypes
from importlib.resources import files

from .types import CoordinatorError


def load(package: str, name: str, part: str, abi: int) -> ctypes.CDLL:
    """The library `name` of a package, whose function `part` says that it is of this build.

    Raises CoordinatorError.
    """
    path = files(f"moehive.coordinator.{package}") / name
    try:
        loaded = ctypes.CDLL(str(path))
        found = getattr(loaded, part)()
    except (OSError, AttributeError) as error:
        raise CoordinatorError(f"The library {path} can't be loaded; install moehive again.") from error
    if found != abi:
        raise CoordinatorError(f"The library {path} is of another build; install moehive again.")
    return loaded
