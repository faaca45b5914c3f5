"""This machine as a cluster of one, measured in half a second: what an estimate is for when no cluster is named."""

from time import perf_counter

from moehive.kernels.machine import available_memory, cores

from .cluster import Cluster, Machine, Tier

_READ_BYTES = 256 << 20  # far more than caches hold
_PASSES = 4
_CALLS_S = 13.4e-3  # of `_calls` on the machine that constants.py's fixed seconds are of
RTT_S, BANDWIDTH = 0.3e-3, 125e6  # of a home network with cables, 1 Gbit/s: nothing here uses them


def this_machine() -> Cluster:
    """Its free RAM and the speed at which all cores read it. Raises NativeLibraryError."""
    ram = Tier(available_memory(), read_speed(cores()))
    machine = Machine("this machine", coordinator=True, ram=ram, step_factor=step_factor())
    return Cluster(RTT_S, BANDWIDTH, (machine,))


def read_speed(threads: int) -> float:
    """Bytes a second that some threads read from RAM, the best of a few passes. Raises NativeLibraryError."""
    import torch

    from moehive.kernels.memory import read_memory

    memory = torch.ones(_READ_BYTES, dtype=torch.uint8)
    best = float("inf")
    for _ in range(_PASSES):
        start = perf_counter()
        read_memory(memory, threads)
        best = min(best, perf_counter() - start)
    return _READ_BYTES / best


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
