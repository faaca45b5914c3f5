"""Reads experts' files from disk: many pieces in flight on a few threads, what is needed now before what is foreseen.

With O_DIRECT the disk writes into the expert's own buffer. Where a file system has no O_DIRECT, or is slower with it
(`choose` measures), files are read through the page cache with readahead, and leave it afterwards.
"""

import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from time import perf_counter

import torch

from .arena import PAGE, padded

log = logging.getLogger(__name__)

THREADS = 4  # reads in flight; more gained nothing on NVMe and virtual disks, one alone left a third unused
PIECE_BYTES = 1 << 20  # of one read: an expert that is waited for is read by all threads
_DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS
SAMPLE_BYTES = 64 << 20  # read each way to choose

Done = Callable[[OSError | None], None]


class Urgency(IntEnum):
    """What is read first."""

    NEEDED = 0
    FORESEEN = 1
    SPARE = 2  # fills room that nobody needs yet


@dataclass(slots=True, eq=False)
class ReadJob:
    """One file on its way into a buffer."""

    path: Path
    buffer: torch.Tensor  # uint8 [padded(nbytes)], aligned to a page
    nbytes: int  # of the file
    done: Done  # called once, on a reader's thread
    urgency: Urgency
    claimed: int = 0  # bytes that some thread has taken on
    reading: int = 0  # pieces in hand
    descriptor: int = -1
    error: OSError | None = None


@dataclass(slots=True)
class ReadTotals:
    """Since start: bytes read, and the seconds in which at least one read was in flight."""

    nbytes: int = 0
    seconds: float = 0.0


class DiskReader:
    """A small pool of reading threads. Every method may be called on any thread."""

    def __init__(self, threads: int = THREADS) -> None:
        self.direct = bool(_DIRECT)
        self.totals = ReadTotals()
        self._changed = threading.Condition()
        self._lines: tuple[deque[ReadJob], ...] = tuple(deque() for _ in Urgency)
        self._in_flight = 0
        self._busy_since = 0.0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"disk-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, job: ReadJob) -> None:
        """Puts a file in line."""
        with self._changed:
            self._lines[job.urgency].append(job)
            self._changed.notify_all()

    def hurry(self, job: ReadJob, urgency: Urgency) -> None:
        """A file in line has become more urgent."""
        with self._changed:
            line = self._lines[job.urgency]
            if urgency < job.urgency and job in line:
                line.remove(job)
                job.urgency = urgency
                self._lines[urgency].append(job)

    def cancel(self, job: ReadJob) -> bool:
        """Takes a file out of line; False when its reading has begun (and `done` will be called)."""
        with self._changed:
            if job.claimed:
                return False
            self._lines[job.urgency].remove(job)
            return True

    def choose(self, paths: Sequence[Path]) -> None:
        """Reads some of `paths` with O_DIRECT and through the page cache, and keeps the quicker way."""
        if not _DIRECT:
            return
        rates = {direct: sample_rate(paths[direct::2], direct) for direct in (True, False)}
        if rates[True] and rates[False]:
            self.direct = rates[True] >= rates[False]
            log.info(
                "Experts on disk are read %s (%.2f GB/s; the page cache's way gives %.2f GB/s).",
                "with O_DIRECT" if self.direct else "through the page cache", rates[True] / 1e9, rates[False] / 1e9,
            )  # fmt: skip

    def close(self) -> None:
        """Ends the threads; what is in line is not read any more. Not to be called on one of them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not any(self._lines):
                    self._changed.wait()
                if self._closed:
                    return
                job = next(line[0] for line in self._lines if line)
                offset = job.claimed
                size = min(PIECE_BYTES, job.nbytes - offset)
                job.claimed += size
                if job.claimed == job.nbytes:
                    self._lines[job.urgency].remove(job)
                job.reading += 1
                if job.descriptor < 0:
                    self._open(job)
                if not self._in_flight:
                    self._busy_since = perf_counter()
                self._in_flight += 1
            error = job.error if job.error is not None else _read_piece(job, offset, size)
            with self._changed:
                self._finish_piece(job, size, error)
                ended = job.claimed == job.nbytes and not job.reading
            if ended:
                self._end(job)
            del job  # or this thread would hold its memory while it waits

    def _open(self, job: ReadJob) -> None:
        try:
            job.descriptor = open_for_reading(job.path, self.direct)
        except OSError as error:
            job.error = error

    def _finish_piece(self, job: ReadJob, size: int, error: OSError | None) -> None:
        job.reading -= 1
        job.error = job.error or error
        if job.error is not None and job.claimed < job.nbytes:  # the rest is of no use
            job.claimed = job.nbytes
            self._lines[job.urgency].remove(job)
        self._in_flight -= 1
        self.totals.nbytes += size
        if not self._in_flight:
            self.totals.seconds += perf_counter() - self._busy_since

    def _end(self, job: ReadJob) -> None:
        if job.descriptor >= 0:
            if not self.direct:
                os.posix_fadvise(job.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(job.descriptor)
        job.done(job.error)


def open_for_reading(path: Path, direct: bool) -> int:
    """A descriptor of a file, with O_DIRECT if `direct` and the file system knows it. Raises OSError."""
    if direct:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
        except OSError:
            pass  # tmpfs, some network file systems
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return descriptor


def _read_piece(job: ReadJob, offset: int, size: int) -> OSError | None:
    """Reads `size` bytes at `offset` into the job's buffer; a direct read covers whole pages."""
    view = memoryview(job.buffer.numpy().data)[offset : offset + padded(size)]
    done = 0
    try:
        while done < size:
            count = os.preadv(job.descriptor, [view[done:]], offset + done)
            if done + count < size:
                count -= count % PAGE  # a direct read goes on at a page's start
            if count <= 0:
                return OSError(f"{job.path} has fewer than {job.nbytes} bytes")
            done += count
    except OSError as error:
        return error
    return None


def sample_rate(paths: Sequence[Path], direct: bool) -> float:
    """Bytes a second of reading some files as `DiskReader` does, none of them in the page cache; 0 without files.

    Takes memory for one file: all are read to the same place.
    """
    sizes = {path: path.stat().st_size for path in paths}
    total, chosen = 0, []
    for path, nbytes in sizes.items():
        if total < SAMPLE_BYTES and nbytes:
            chosen.append(path)
            total += nbytes
    if not chosen:
        return 0.0
    for path in chosen:
        forget_pages(path)
    buffer = torch.frombuffer(mmap.mmap(-1, padded(max(sizes.values()))), dtype=torch.uint8)
    reader = DiskReader()
    reader.direct = direct
    left = threading.Semaphore(0)
    errors: list[OSError] = []

    def done(error: OSError | None) -> None:
        if error is not None:
            errors.append(error)
        left.release()

    start = perf_counter()
    for path in chosen:
        reader.read(ReadJob(path, buffer, sizes[path], done, Urgency.NEEDED))
    for _ in chosen:
        left.acquire()
    seconds = perf_counter() - start
    reader.close()
    return 0.0 if errors else total / seconds


def forget_pages(path: Path) -> None:
    """Has the kernel drop a file from its page cache."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
