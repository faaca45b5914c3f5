"""The dispatcher's native library by ctypes: what is done for each layer of a step. Its C side is cpp/dispatch.cc."""

import ctypes
import functools
from typing import Any

import numpy.typing as npt

from moehive.kernels.library import load

_ABI = 7


@functools.cache
def library() -> ctypes.CDLL:
    """The library, with its signatures. Raises NativeLibraryError."""
    loaded = load("moehive_dispatch_abi", _ABI, "coordinator.dispatch", "dispatch")
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.moehive_choose.argtypes = (
        pointer, size, size, pointer, pointer, size, pointer, size, ctypes.c_int32, pointer
    )  # fmt: skip
    loaded.moehive_split.argtypes = (pointer, pointer, size, size, pointer, size, pointer)
    loaded.moehive_split.restype = size
    real, flag, number = ctypes.c_double, ctypes.c_int32, ctypes.c_uint64
    for name, result, arguments in (
        ("note_node", None, (pointer, size, size, size, real, size)),
        ("note_link", None, (pointer, size, size, real)),
        ("flights", pointer, ()),
        ("flights_end", None, (pointer,)),
        ("flight_ask", size, (pointer, pointer, number, pointer, pointer, pointer, size, flag, size)),
        ("flight_view", pointer, (pointer, size)),
        ("flight_reply", size, (pointer, pointer, pointer, size, pointer)),
        ("flight_take", flag, (pointer, pointer, size, pointer, pointer, pointer)),
        ("flight_any", size, (pointer, pointer)),
        ("flight_find", size, (pointer, pointer, number)),
        ("flight_put", None, (pointer, size, size, pointer)),
        ("flight_settle", None, (pointer, size, size)),
        ("flight_rows", pointer, (pointer, size, size)),
        ("flight_sum", flag, (pointer, size, pointer)),
        ("flight_land", size, (pointer, size, pointer, size, pointer)),
        ("flight_release", None, (pointer, size)),
    ):
        function = getattr(loaded, f"moehive_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


@functools.cache
def take_function() -> int:
    """The address of what takes a node's replies as a connection reads them."""
    return ctypes.cast(library().moehive_flight_take, ctypes.c_void_p).value or 0


def address(array: npt.NDArray[Any]) -> int:
    """Where the first element of an array is that lies in one piece. Quick: a layer asks for several of these."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    except (TypeError, ValueError):  # nobody may write to it, or it is empty
        return array.ctypes.data
