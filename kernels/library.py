"""Native libraries by ctypes, whichever part they belong to. Needs nothing but Python."""

import ctypes
from importlib.resources import files


class NativeLibraryError(Exception):
    """A native library is missing, of another build, or refuses; its text is one sentence."""


def load(part: str, abi: int, package: str = "kernels", name: str = "kernels") -> ctypes.CDLL:
    """The native library `name` of a package, whose function `part` says that it is of this build.

    Raises NativeLibraryError.
    """
    path = files(f"moehive.{package}") / f"libmoehive_{name}.so"
    try:
        loaded = ctypes.CDLL(str(path))
        found = getattr(loaded, part)()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(
            f"The native library {path} can't be loaded ({error}); install moehive again."
        ) from error
    if found != abi:
        raise NativeLibraryError(f"The native library {path} is of another build; install moehive again.")
    return loaded
