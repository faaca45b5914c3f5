"""Memory for weights that stay, and how fast memory can be read by plain code."""

import ctypes
import mmap

import torch

from .blob import empty_blob
from .geometry import ALIGNMENT
from .library import NativeLibraryError
from .native import library

_LARGE_PAGE = 2 << 20  # bytes
_CHUNK = 32 << 20  # bytes that are taken from the system at a time


def large_pages(nbytes: int) -> torch.Tensor:
    """Zeroed uint8 [nbytes] on the CPU, aligned to 64; on large pages of the system's where it has them.

    It is given back when the last view of it goes.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return empty_blob(nbytes).zero_()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has large pages of its own, often none
    memory = mmap.mmap(-1, nbytes + _LARGE_PAGE, private)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _LARGE_PAGE
    return whole[start : start + nbytes]


class WeightMemory:
    """Buffers for matrices that are read from end to end again and again, on large pages where the system has them.

    With pages of 4 KiB a core that streams weights waits for the translation of addresses: measured on Zen 3, one
    thread, plain read: 14 GB/s, with large pages 16 to 18. What is taken is given back when the last buffer of its
    chunk goes.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)  # what is left of the latest

    def take(self, nbytes: int) -> torch.Tensor:
        """See large_pages."""
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if size > len(self._chunk):
            self._chunk = large_pages(max(size, _CHUNK))
        taken, self._chunk = self._chunk[:nbytes], self._chunk[size:]
        return taken


def read_memory(memory: torch.Tensor, threads: int, streams: int = 1) -> None:
    """Reads each byte of `memory` (contiguous, on the CPU) once with `threads` threads; the caller takes the time.

    Each thread reads so many streams in turns: a processor's prefetchers may bring several faster than one. Raises
    NativeLibraryError if the library is missing or can't start its threads.
    """
    read = library().moehive_read
    read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
    total = ctypes.c_uint64()
    if read(memory.data_ptr(), memory.nbytes, threads, streams, ctypes.byref(total)) != 0:
        raise NativeLibraryError(f"The native library can't read memory with {threads} threads.")
