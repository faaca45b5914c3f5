"""Memory of a process with a hop: what is freed is kept, and what stays is not walked again and again.

glibc hands freed memory back to the kernel beyond 128 KiB, and gets it again page by page, zeroed: for a message of
1 MiB that costs more than everything else about it.

Python's collector walks all objects when enough new ones have come. Torch, transformers and a model are some hundred
thousand that never go: a walk stops the process for about a tenth of a second.
"""

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 16 << 20  # freed memory at the top of the heap that stays ours
# Larger blocks are the kernel's own, given back as soon as they are freed: a node's memory is bounded, and the
# largest blocks leave the largest holes. A chunk of a prompt, 512 states of 2,048 f32s or 4,096 bf16s, is 4 MiB and
# the head of its message; it is just below, for its pages take longer than the rest of its way.
_OWN_PAGES_BYTES = (4 << 20) + (64 << 10)


def keep_freed_memory() -> None:
    """For a process with a hop, once, at its start. Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_BYTES)


def settle_heap() -> None:
    """Once a process serves: the collector leaves alone all objects that there are now."""
    gc.collect()
    gc.freeze()
