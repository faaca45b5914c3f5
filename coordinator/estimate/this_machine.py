"""This machine, measured: memory, kernels, disk. As a cluster of one it is what an estimate is for by default."""

import mmap
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import NamedTemporaryFile
from time import perf_counter

from moehive.kernels.machine import available_memory, cores

from .cluster import Cluster, Machine, Tier

_PASSES = 4
_DISK_SHARE = 0.8  # of what is free, as a node's `--disk`: the disk is somebody's
_DISK_BYTES = 128 << 20  # written and read
_DISK_PIECE, _DISK_READERS = 4 << 20, 4  # as a node reads experts: several reads in flight
_CALLS_S = 13.4e-3  # of `_calls` on the machine that constants.py's fixed seconds are of
RTT_S, BANDWIDTH = 0.3e-3, 125e6  # of a home network with cables, 1 Gbit/s: nothing here uses them


def this_machine() -> Cluster:
    """Its free RAM, and how fast all cores are. Raises NativeLibraryError."""
    return Cluster(RTT_S, BANDWIDTH, (measured("this machine", available_memory()),))


def measured(name: str, ram_bytes: int) -> Machine:
    """This machine as a coordinator with so much RAM, measured in a second. Raises NativeLibraryError."""
    from moehive.kernels.speed import multiplying, multiplying_one, reading

    return Machine(
        name,
        coordinator=True,
        ram=Tier(ram_bytes, reading(cores())),
        step_factor=step_factor(),
        products_per_s=multiplying(cores()),
        token_products_per_s=multiplying_one(cores()),
    )


def disk_of(folder: Path) -> Tier:
    """Most of what is free where `folder` lies, and how fast it is read: of a file that is written for it.

    Raises OSError for a disk that can't be written, or is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = int(_DISK_SHARE * shutil.disk_usage(folder).free)
    with NamedTemporaryFile(dir=folder, prefix=".moehive-") as file:
        piece = os.urandom(_DISK_PIECE)
        for _ in range(_DISK_BYTES // _DISK_PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # where there is no O_DIRECT, the pages must be gone
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            source = os.open(file.name, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:  # a file system without it
            source = os.open(file.name, os.O_RDONLY)
        try:

            def read(start: int) -> int:
                with mmap.mmap(-1, _DISK_PIECE) as buffer:  # aligned to a page, as O_DIRECT wants it
                    return os.preadv(source, [buffer], start)

            with ThreadPoolExecutor(_DISK_READERS) as pool:
                start = perf_counter()
                done = sum(pool.map(read, range(0, _DISK_BYTES, _DISK_PIECE)))
                seconds = perf_counter() - start
        finally:
            os.close(source)
    return Tier(free, done / seconds)


def step_factor() -> float:
    """How much longer than the machine of constants.py this one takes for what is no reading of weights.

    That is calls of Python, and of torch for a handful of numbers; the best of a few passes.
    """
    best = float("inf")
    for _ in range(_PASSES):
        start = perf_counter()
        _calls()
        best = min(best, perf_counter() - start)
    return best / _CALLS_S


def _calls() -> None:
    import numpy as np
    import torch

    kept: dict[int, tuple[int, bytes]] = {}
    for step in range(1000):
        row = torch.empty((1, 64))
        numbers = np.array([step, 1, 2, 3], dtype=np.uint32)
        kept[step % 16] = row.shape[1], numbers[1:].tobytes()
        _ = [place for place, (_, raw) in kept.items() if len(raw) == 12]
