"""How fast memory can be read by plain code: what kernels that stream weights are measured against."""

import ctypes

import torch

from .native import NativeLibraryError, library


def read_memory(memory: torch.Tensor, threads: int) -> None:
    """Reads each byte of `memory` (contiguous, on the CPU) once with `threads` threads; the caller takes the time.

    Raises NativeLibraryError if the library is missing or can't start its threads.
    """
    read = library().moehive_read
    read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p)
    total = ctypes.c_uint64()
    if read(memory.data_ptr(), memory.nbytes, threads, ctypes.byref(total)) != 0:
        raise NativeLibraryError(f"The native library can't read memory with {threads} threads.")
