"""What the benchmarks of kernels and trunk time with."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def seconds_of(work: Callable[[], object], times: int) -> float:
    """How long `times` calls of `work` take together."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - start


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Lets torch use `count` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
