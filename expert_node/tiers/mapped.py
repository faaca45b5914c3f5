"""The other way to read experts: mapped files with readahead. Measured beside `reader.sample_rate`, not used.

A mapped expert would be computed in the page cache, which no allowance bounds, and a miss in the middle of a kernel
would stop all of its threads.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from .reader import SAMPLE_BYTES, forget_pages


def mapped_rate(paths: Sequence[Path]) -> float:
    """Bytes a second of mapping files that are not in the page cache: readahead for all, then a look at each page."""
    chosen: list[tuple[Path, int]] = []
    for path in paths:
        if sum(size for _, size in chosen) < SAMPLE_BYTES:
            forget_pages(path)
            chosen.append((path, path.stat().st_size))
    start = perf_counter()
    maps = []
    for path, _ in chosen:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        maps.append(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
        os.close(descriptor)
        maps[-1].madvise(mmap.MADV_WILLNEED)
    for one in maps:
        np.frombuffer(one, dtype=np.uint8)[:: mmap.PAGESIZE].max()
    return sum(size for _, size in chosen) / (perf_counter() - start)
