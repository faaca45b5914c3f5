"""How fast this machine reads weights and multiplies with them: the experts' own kernel, timed for a second.

What plain code reads says less: with all else equal, processors differ by a third in how much of it a kernel reaches,
and by three times in how many products they do meanwhile. With one token a product is mostly the unpacking of its
weight, and in q8_0 there is next to none, so that is timed with another format. What others take beside these two is
nearly the same everywhere.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from .geometry import ALIGNMENT, ExpertSpec, Format
from .memory import WeightMemory
from .native import NativeExperts, kernels

FORMAT: Format = "q8_0"
PACKED: Format = "q4_k"
_BUDGET_SECONDS = 0.2  # of each of the three
_LEAST_PASSES = 3
_HIDDEN, _INTERMEDIATE = 2048, 512
_TOKENS = 64  # that one expert has of a prompt's piece, when it has many
_CACHED = 2  # experts of 1.8 MB


def reading(threads: int) -> float:
    """Bytes of weights a second that `threads` threads read from RAM and multiply with one token.

    The median of some passes over more than any cache holds. Raises NativeLibraryError.
    """
    spec = _spec(FORMAT)
    count = _buffer_bytes() // spec.nbytes
    return count * spec.nbytes / statistics.median(_passes(threads, 1, count, spec))


def multiplying(threads: int) -> float:
    """Products of a weight and a number a second that `threads` threads do with weights that are at hand.

    The best of some passes: what arithmetic loses is a processor that something else had. Raises NativeLibraryError.
    """
    return _TOKENS * _spec(FORMAT).weights / min(_passes(threads, _TOKENS, 1, _spec(FORMAT)))


def multiplying_one(threads: int) -> float:
    """Products a second that `threads` threads do of one token with weights in q4_k that lie in their caches.

    The best of some passes. Raises NativeLibraryError.
    """
    return _CACHED * _spec(PACKED).weights / min(_passes(threads, 1, _CACHED, _spec(PACKED)))


def _passes(threads: int, tokens: int, count: int, spec: ExpertSpec) -> list[float]:
    """Seconds of passes through `count` experts that lie side by side, each with all of `tokens`."""
    native = NativeExperts(kernels()[0], threads)
    step = -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = WeightMemory().take(count * step)  # and given back at the end
    buffer.zero_()  # each page is there before the first pass; zeros take as long as other numbers
    addresses = [buffer.data_ptr() + number * step for number in range(count)] * tokens
    hidden = torch.ones(tokens, spec.hidden_size)
    offsets = np.arange(tokens + 1, dtype=np.uint32) * np.uint32(count)
    weights = np.ones(tokens * count, dtype=np.float32)
    return _timed(lambda: native.layer(spec, hidden, offsets, addresses, weights, added=True))


def _timed(work: Callable[[], object]) -> list[float]:
    """Seconds of each of some calls, for a while, after one that does not count."""
    work()
    taken: list[float] = []
    end = perf_counter() + _BUDGET_SECONDS
    while (start := perf_counter()) < end or len(taken) < _LEAST_PASSES:
        work()
        taken.append(perf_counter() - start)
    return taken


def _spec(format: Format) -> ExpertSpec:
    return ExpertSpec(hidden_size=_HIDDEN, intermediate_size=_INTERMEDIATE, activation="silu", format=format)


def _buffer_bytes() -> int:
    """Four times the largest cache, 64 MiB to 512 MiB."""
    largest = 32 << 20
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            largest = max(largest, int(text[:-1]) << 10)
    return min(max(4 * largest, 64 << 20), 512 << 20)
