"""This machine as a cluster of one, measured in half a second: what an estimate is for when no cluster is named."""

from time import perf_counter

from moehive.kernels.machine import available_memory

from ..settings import cores
from .cluster import Cluster, Machine, Tier

_READ_BYTES = 256 << 20  # far more than caches hold
_PASSES = 4
RTT_S, BANDWIDTH = 0.3e-3, 125e6  # of a home network with cables, 1 Gbit/s: nothing here uses them


def this_machine() -> Cluster:
    """Its free RAM and the speed at which all cores read it. Raises NativeLibraryError."""
    ram = Tier(available_memory(), read_speed(cores()))
    return Cluster(RTT_S, BANDWIDTH, (Machine("this machine", coordinator=True, ram=ram),))


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
