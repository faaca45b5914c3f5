"""The wire's native library by ctypes. Its C side is cpp/."""

import ctypes
import functools
from importlib.resources import files

_ABI = 3


@functools.cache
def library() -> ctypes.CDLL:
    """The library, with its signatures. Raises ImportError."""
    path = files("moehive.proto") / "libmoehive_proto.so"
    try:
        loaded = ctypes.CDLL(str(path))
        found = loaded.moehive_proto_abi()
    except (OSError, AttributeError) as error:
        raise ImportError(f"The library {path} can't be loaded; install moehive again.") from error
    if found != _ABI:
        raise ImportError(f"The library {path} is of another build; install moehive again.")
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.moehive_round.argtypes = (pointer, flag, size, size, pointer, pointer)
    loaded.moehive_round.restype = None
    loaded.moehive_unround.argtypes = (pointer, pointer, size, size, pointer)
    loaded.moehive_look.argtypes = (flag, flag, size, size)
    return loaded
