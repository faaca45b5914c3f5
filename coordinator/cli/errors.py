"""Errors as one sentence for a person, and as an exit code."""

from ..settings import SettingsError
from ..types import CoordinatorError


def sentence(error: Exception) -> str:
    """What went wrong, in words."""
    from moehive.client import MoehiveError
    from moehive.kernels.geometry import GeometryError
    from moehive.kernels.library import NativeLibraryError

    if isinstance(error, CoordinatorError | GeometryError | MoehiveError | NativeLibraryError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno is None:  # raised by us, with a sentence
            return str(error)
        if error.filename is None:
            return f"{error.strerror}."
        return f"{error.filename} can't be used ({error.strerror}); check who owns it, and the space on its disk."
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("moehive"):
        return f"The package {error.name} is missing here; install it with: pip install 'moehive[coordinator]'"
    return (
        f"This is a bug in Moehive ({type(error).__name__}: {error}). Run it again with MOEHIVE_DEBUG=1 for the "
        "traceback."
    )


def exit_code(error: Exception) -> int:
    """2 for a setting that no restart cures, else 1."""
    return 2 if isinstance(error, SettingsError) else 1
