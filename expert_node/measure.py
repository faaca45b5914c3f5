"""How fast this machine reads its RAM.

The bandwidth is measured once in less than a second and kept for 30 days in <state>/bandwidth.json; another
processor or another number of threads measures again.
"""

import json
import logging
import mmap
import platform
from pathlib import Path
from time import perf_counter, time

import torch

from .files import write_private

log = logging.getLogger(__name__)

KEPT_SECONDS = 30 * 86_400
BUDGET_SECONDS = 0.4


def read_bandwidth(state: Path, threads: int) -> float:
    """Bytes a second that `threads` threads read from RAM. Raises NodeError when the state cannot be written."""
    processor = _processor()
    path = state / "bandwidth.json"
    try:
        kept = json.loads(path.read_bytes())
        known = (kept["processor"], kept["threads"]) == (processor, threads)
        if known and 0 <= time() - kept["measured"] < KEPT_SECONDS and kept["bytes_per_second"] > 0:
            return float(kept["bytes_per_second"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); measuring again.", path, error)
    rate = _measure(threads)
    log.info("RAM is read at %.1f GB/s by %d threads.", rate / 1e9, threads)
    kept = {
        "processor": processor,
        "threads": threads,
        "measured": time(),
        "bytes_per_second": rate,
    }
    write_private(path, json.dumps(kept).encode())
    return rate


def _measure(threads: int) -> float:
    """The best of some passes over a buffer that no cache holds."""
    # The kernel's own pages, given back at the end: the allocator would keep what it freed.
    pages = mmap.mmap(-1, _buffer_bytes())
    buffer = torch.frombuffer(pages, dtype=torch.float32)
    buffer.zero_()  # each page is there before the first pass
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = float("inf")
        end = perf_counter() + BUDGET_SECONDS
        while (start := perf_counter()) < end:
            buffer.sum()
            best = min(best, perf_counter() - start)
    finally:
        torch.set_num_threads(before)
        del buffer
        pages.close()
    return _buffer_bytes() / best


def _buffer_bytes() -> int:
    """Four times the largest cache, 64 MiB to 512 MiB."""
    largest = 32 << 20
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            largest = max(largest, int(text[:-1]) << 10)
    return min(max(4 * largest, 64 << 20), 512 << 20)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
