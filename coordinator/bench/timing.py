"""What the benchmarks of kernels and trunk time with."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from moehive.kernels.memory import read_memory

_STREAMS = (1, 4)  # of a thread: on Zen 3 four are read half as fast again as one, on Zen 4 one is the quickest


def seconds_of(work: Callable[[], object], times: int) -> float:
    """How long `times` calls of `work` take together."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - start


def device_seconds_of(work: Callable[[], object], times: int, device: torch.device) -> float:
    """How long `times` calls of `work` take together, until `device` has done them all."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    return seconds_of(work, times) + seconds_of(wait, 1)


def read_seconds(memory: torch.Tensor, threads: int) -> float:
    """How long a plain read of `memory` takes with `threads` threads, in as many streams as are quicker.

    Raises NativeLibraryError.
    """
    return min(seconds_of(partial(read_memory, memory, threads, streams), 1) for streams in _STREAMS)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Lets torch use `count` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
