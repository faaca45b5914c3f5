"""How fast this machine computes experts: what it reads for one token, and how much it multiplies.

All is measured once in a second and kept for 30 days in <state>/speed.json; another processor or another
number of threads measures again.
"""

import json
import logging
import platform
from pathlib import Path
from time import perf_counter, time
from typing import NamedTuple

import torch

from moehive.kernels.library import NativeLibraryError
from moehive.kernels.speed import multiplying, multiplying_one, reading

from .files import write_private

log = logging.getLogger(__name__)

KEPT_SECONDS = 30 * 86_400
_PLAIN_BYTES, _PLAIN_SECONDS = 128 << 20, 0.4


class Speed(NamedTuple):
    """Bytes of experts a second from RAM, and products of a number and a weight, 0 if not measured.

    Products in q8_0 with many tokens, and in q4_k with one token and weights that lie in caches.
    """

    read_bandwidth: float
    products_per_s: float
    token_products_per_s: float


def speed(state: Path, threads: int) -> Speed:
    """Of `threads` threads. Raises NodeError when the state cannot be written."""
    processor = _processor()
    path = state / "speed.json"
    try:
        kept = json.loads(path.read_bytes())
        known = (kept["processor"], kept["threads"]) == (processor, threads)
        found = Speed(*(float(kept[name]) for name in Speed._fields))
        if known and 0 <= time() - kept["measured"] < KEPT_SECONDS and found.read_bandwidth > 0:
            return found
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); measuring again.", path, error)
    found = _measure(threads)
    log.info(
        "Experts are read from RAM at %.1f GB/s by %d threads, which do %.0f billion products a second.",
        found.read_bandwidth / 1e9,
        threads,
        found.products_per_s / 1e9,
    )
    kept = {"processor": processor, "threads": threads, "measured": time(), **found._asdict()}
    write_private(path, json.dumps(kept).encode())
    return found


def _measure(threads: int) -> Speed:
    try:
        return Speed(reading(threads), multiplying(threads), multiplying_one(threads))
    except NativeLibraryError:  # torch computes experts, at no speed that would be worth measuring
        return Speed(_plain_read(threads), 0.0, 0.0)


def _plain_read(threads: int) -> float:
    """Bytes a second that torch reads, the best of some passes."""
    buffer = torch.zeros(_PLAIN_BYTES // 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = float("inf")
        end = perf_counter() + _PLAIN_SECONDS
        while (start := perf_counter()) < end:
            buffer.sum()
            best = min(best, perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return _PLAIN_BYTES / best


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
