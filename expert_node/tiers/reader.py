"""Reads experts' files from disk: many pieces in flight on a few native threads, what is due first before the rest.

With O_DIRECT the disk writes into the expert's own buffer. Where a file system has no O_DIRECT, or is slower with it
(`choose` measures), files are read through the page cache with readahead, and leave it afterwards. The threads are
cpp/disk.cc's and never take Python's lock; what they have read is handed out by `collect`, on the caller's thread.
"""

import ctypes
import functools
import logging
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from moehive.kernels.library import load

from .arena import padded

log = logging.getLogger(__name__)

THREADS = 4  # reads in flight; more gained nothing on NVMe and virtual disks, one alone left a third unused
PIECE_BYTES = 1 << 19  # of one read: an expert that is waited for is read by all threads, and waits for few others
SAMPLE_BYTES = 64 << 20  # read each way to choose
NOW = 0  # due: a request waits for it
SPARE = 1 << 62  # due: fills room that nobody needs yet
_ABI = 1
_COLLECTED = 64  # files at a time
_SHORT, _CANCELLED = -1, -2  # disk.cc's, in place of an errno


@dataclass(slots=True, eq=False)
class ReadJob:
    """One file on its way into a buffer."""

    path: Path
    buffer: torch.Tensor  # uint8 [padded(nbytes)], aligned to a page
    nbytes: int  # of the file
    inbox: "Inbox"
    number: int = 0  # disk.cc's
    error: OSError | None = None
    cancelled: bool = False  # and not read


Inbox = deque[ReadJob]  # where a file goes when it is read


@dataclass(frozen=True, slots=True)
class ReadTotals:
    """Since start: bytes read, and the seconds in which at least one read was in flight."""

    nbytes: int
    seconds: float


class DiskReader:
    """A small pool of reading threads. Every method may be called on any thread."""

    def __init__(self, threads: int = THREADS, piece_bytes: int = PIECE_BYTES) -> None:
        """Raises NativeLibraryError; MemoryError when there can be no more threads."""
        self.direct = hasattr(os, "O_DIRECT")  # not on macOS
        self.bandwidth = 0.0  # bytes a second, when `choose` measured it; 0: not yet
        self._library = _library()
        self._handle: int = self._library.moehive_disk_create(threads, piece_bytes)
        if not self._handle:
            raise MemoryError("The threads that read the experts' files can't be started.")
        self._end = weakref.finalize(self, self._library.moehive_disk_destroy, self._handle)
        self._end.atexit = False  # the threads end with the process
        self._collecting = threading.Lock()
        self._jobs: dict[int, ReadJob] = {}  # whose buffers the threads write to
        self._numbers = (ctypes.c_int64 * _COLLECTED)()
        self._errors = (ctypes.c_int32 * _COLLECTED)()

    def read(self, job: ReadJob, due: int) -> None:
        """Puts a file in line; what is due at the smallest number is read first. `collect` puts it in its inbox."""
        with self._collecting:  # it must not be collected before it has its number
            job.number = self._library.moehive_disk_read(
                self._handle, os.fsencode(job.path), job.buffer.data_ptr(), job.nbytes, due, self.direct
            )
            if not job.number:
                raise MemoryError("There is no memory left to read an expert's file.")
            self._jobs[job.number] = job

    def move(self, job: ReadJob, due: int) -> None:
        """What is left of a file is due at another time."""
        self._library.moehive_disk_move(self._handle, job.number, due)

    def cancel(self, job: ReadJob) -> bool:
        """Takes what is left of a file out of line; False when a piece is being read: then it will be collected."""
        if not self._library.moehive_disk_cancel(self._handle, job.number):
            return False
        del self._jobs[job.number]
        return True

    def collect(self) -> None:
        """Puts what is read, or has failed, into the inboxes."""
        with self._collecting:
            count = _COLLECTED
            while count == _COLLECTED:
                count = self._library.moehive_disk_collect(self._handle, self._numbers, self._errors, _COLLECTED)
                for number, error in zip(self._numbers[:count], self._errors[:count], strict=True):
                    job = self._jobs.pop(number)
                    job.cancelled = error == _CANCELLED
                    if error and not job.cancelled:
                        job.error = _error(job, error)
                    job.inbox.append(job)

    @property
    def news(self) -> int:
        """Changes whenever there is something to collect, and with `wake`."""
        news: int = self._library.moehive_disk_news(self._handle)
        return news

    def wait(self, seen: int) -> None:
        """Waits until `news` is something else than `seen`."""
        self._library.moehive_disk_wait(self._handle, seen)

    def wake(self) -> None:
        """Wakes all who wait."""
        self._library.moehive_disk_wake(self._handle)

    @property
    def totals(self) -> ReadTotals:
        """What was read so far."""
        nbytes, seconds = ctypes.c_int64(), ctypes.c_double()
        self._library.moehive_disk_totals(self._handle, ctypes.byref(nbytes), ctypes.byref(seconds))
        return ReadTotals(nbytes.value, seconds.value)

    def choose(self, paths: Sequence[Path]) -> None:
        """Reads some of `paths` with O_DIRECT and through the page cache, and keeps the quicker way."""
        if not hasattr(os, "O_DIRECT"):
            return
        rates = {direct: sample_rate(paths[direct::2], direct) for direct in (True, False)}
        self.bandwidth = max(rates.values())
        if rates[True] and rates[False]:
            self.direct = rates[True] >= rates[False]
            log.info(
                "Experts on disk are read %s (%.2f GB/s; the page cache's way gives %.2f GB/s).",
                "with O_DIRECT" if self.direct else "through the page cache", rates[True] / 1e9, rates[False] / 1e9,
            )  # fmt: skip

    def close(self) -> None:
        """Ends the threads; what is in line is not read any more. Nothing may be asked meanwhile or afterwards."""
        self._end()
        self._jobs.clear()


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = load("moehive_disk_abi", _ABI, "expert_node.tiers", "disk")
    pointer, size, flag, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint64
    signatures: dict[str, tuple[object, ...]] = {  # what it returns, and its arguments
        "create": (pointer, flag, size),
        "destroy": (None, pointer),
        "read": (size, pointer, ctypes.c_char_p, pointer, size, size, flag),
        "move": (None, pointer, size, size),
        "cancel": (flag, pointer, size),
        "collect": (size, pointer, pointer, pointer, size),
        "news": (count, pointer),
        "wait": (count, pointer, count),
        "wake": (None, pointer),
        "totals": (None, pointer, pointer, pointer),
    }
    for name, (returns, *arguments) in signatures.items():
        function = getattr(loaded, f"moehive_disk_{name}")
        function.restype, function.argtypes = returns, arguments
    return loaded


def _error(job: ReadJob, number: int) -> OSError:
    if number == _SHORT:
        return OSError(f"{job.path} has fewer than {job.nbytes} bytes")
    return OSError(number, os.strerror(number), str(job.path))


def sample_rate(paths: Sequence[Path], direct: bool, nbytes: int = SAMPLE_BYTES) -> float:
    """Bytes a second of reading some files as `DiskReader` does, none of them in the page cache; 0 without files.

    Reads at least `nbytes` if the files have that. Takes memory for one file: all are read to the same place.
    """
    sizes = {path: path.stat().st_size for path in paths}
    total, chosen = 0, []
    for path, size in sizes.items():
        if total < nbytes and size:
            chosen.append(path)
            total += size
    if not chosen:
        return 0.0
    for path in chosen:
        forget_pages(path)
    buffer = torch.frombuffer(mmap.mmap(-1, padded(max(sizes.values()))), dtype=torch.uint8)
    buffer.zero_()  # new pages cost a virtual machine as much as reading them from disk
    reader = DiskReader()
    reader.direct = direct
    inbox: Inbox = deque()
    start = perf_counter()
    for path in chosen:
        reader.read(ReadJob(path, buffer, sizes[path], inbox), NOW)
    while len(inbox) < len(chosen):
        seen = reader.news
        reader.collect()
        if len(inbox) < len(chosen):
            reader.wait(seen)
    seconds = perf_counter() - start
    reader.close()
    return 0.0 if any(job.error for job in inbox) else total / seconds


def forget_pages(path: Path) -> None:
    """Has the kernel drop a file from its page cache."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
