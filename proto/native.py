"""The wire's native library by ctypes. Its C side is cpp/."""

import ctypes
import functools
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .wire.messages import Buffer

_ABI = 8


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
    loaded.moehive_unround.restype = None
    loaded.moehive_add_rounded.argtypes = (pointer, pointer, size, size, size, flag, pointer)
    loaded.moehive_look.argtypes = (flag, flag, size, size)
    text = ctypes.c_char_p
    for name, result, arguments in (
        ("tls_there", flag, ()),
        ("tls_context", pointer, (flag, text, text, text, pointer)),
        ("tls_context_end", None, (pointer,)),
        ("socket", pointer, (flag, pointer, text)),
        ("socket_end", None, (pointer,)),
        ("socket_shake_hands", size, (pointer,)),
        ("socket_read", size, (pointer, pointer, size)),
        ("socket_write", size, (pointer, pointer, size, flag)),
        ("socket_say_end", None, (pointer,)),
        ("socket_error", text, (pointer,)),
        ("socket_certificate", size, (pointer, pointer, size)),
        ("socket_speaks_http2", flag, (pointer,)),
        ("serve", size, (*(pointer,) * 6, size, size, pointer)),
        ("serve_on", size, (*(pointer,) * 6, size, size, pointer, pointer, size)),
        ("send", size, (*(pointer,) * 3, size)),
    ):
        function = getattr(loaded, f"moehive_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def address(data: "Buffer") -> int:
    """Where its first byte is."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)
