"""The room in RAM for experts that lie on disk: which are there, which are being read, which make way for others.

Those make way that only wait to fill free room, then the one whose count of uses (use.py) is lowest. What a request
or a prefetch holds stays, and so does what the plan pinned.
"""

import threading
from collections import deque

from .arena import Arena
from .experts import DiskExpert, TierTotals
from .leaving import Leaving
from .reader import SPARE, DiskReader, Inbox, ReadJob
from .use import HALF_LIFE, used


class Room:
    """`capacity_bytes` of RAM. Whoever calls, or changes an expert, holds `lock`."""

    def __init__(self, capacity_bytes: int, layers: int, reader: DiskReader) -> None:
        """`layers`: how many MoE layers the model has."""
        self.lock = threading.RLock()
        self.reader = reader
        self.totals = TierTotals()
        self.requests = 0  # since start: the time by which counts fade and reads are due
        self.resident: list[set[int]] = [set() for _ in range(layers)]  # numbers of each layer's experts
        self.capacity_bytes = capacity_bytes
        self._arena = Arena(capacity_bytes)
        self._inbox: Inbox = deque()
        self._reading: dict[ReadJob, DiskExpert] = {}
        self._leaving = Leaving()
        self._spare: list[DiskExpert] = []  # in line to fill free room; the last one gives way first

    @property
    def taken_bytes(self) -> int:
        """Bytes that experts take, also those that are being read."""
        return self._arena.taken_bytes

    @property
    def reading(self) -> bool:
        """Whether an expert is being read, or in line."""
        return bool(self._reading)

    def collect(self) -> None:
        """Takes what was read meanwhile."""
        self.reader.collect()
        while self._inbox:
            self._arrived(self._inbox.popleft())

    def touch(self, expert: DiskExpert) -> None:
        """A request asks for an expert."""
        expert.count = used(expert.count, self.requests / (HALF_LIFE * len(self.resident)))
        self.totals.lookups += 1
        if expert.weights is not None:
            self.totals.here += 1
            self.totals.foreseen += expert.foreseen
        elif expert.job is not None:
            self.totals.late += expert.foreseen
        expert.foreseen = False

    def read(self, expert: DiskExpert, due: int) -> bool:
        """Begins to read an expert, in place of others if need be; False when there is no room."""
        while (buffer := self._arena.take(expert.nbytes)) is None:
            if due == SPARE or not self._evict():
                return False
        job = ReadJob(expert.path, buffer.memory, expert.file_bytes, self._inbox)
        expert.buffer, expert.job, expert.due = buffer, job, due
        self._reading[job] = expert
        self.reader.read(job, due)
        return True

    def fill_with(self, expert: DiskExpert) -> bool:
        """Puts an expert in line for room that nobody needs yet; False when there is none."""
        if not self.read(expert, SPARE):
            return False
        self._spare.append(expert)
        return True

    def hurry(self, expert: DiskExpert, due: int) -> None:
        """An expert that is being read may have become more urgent."""
        if expert.job is not None and due < expert.due:
            expert.due = due
            self.reader.move(expert.job, due)

    def cancel(self, expert: DiskExpert) -> bool:
        """Takes an expert out of line and its buffer back; False when it is not in line, or its reading has begun."""
        job = expert.job
        if job is None or not self.reader.cancel(job):
            return False
        self._end(expert, job)
        self._free(expert)
        return True

    def may_leave(self, expert: DiskExpert) -> None:
        """Puts an expert that nobody holds among those that make room."""
        if expert.held or expert.pinned or expert.weights is None:
            return
        if expert.removed:
            self._drop(expert)
        else:
            self._leaving.put(expert)

    def remove(self, expert: DiskExpert) -> None:
        """This node holds an expert no more: it leaves as soon as nobody computes with it."""
        self.resident[expert.id.layer].discard(expert.id.expert)
        expert.pinned, expert.removed = False, True
        self.may_leave(expert)

    def _evict(self) -> bool:
        """Makes room by what only waits to fill it, else by the expert that is used least; False: all are held."""
        while self._spare:
            expert = self._spare.pop()
            if expert.due == SPARE and not (expert.held or expert.pinned) and self.cancel(expert):
                return True
        if (least := self._leaving.take()) is not None:
            self._drop(least)
            return True
        return False

    def _arrived(self, job: ReadJob) -> None:
        expert = self._reading[job]
        self._end(expert, job)
        if job.cancelled:
            self._free(expert)
            self.totals.unused += expert.foreseen
            expert.foreseen = False
            return
        if job.error is None:
            assert expert.buffer is not None
            expert.weights = expert.buffer.weights(expert.spec)
            if not expert.removed:
                self.resident[expert.id.layer].add(expert.id.expert)
        else:
            expert.error = job.error
            self._free(expert)
        self.may_leave(expert)

    def _end(self, expert: DiskExpert, job: ReadJob) -> None:
        expert.job = None
        del self._reading[job]

    def _drop(self, expert: DiskExpert) -> None:
        if not expert.removed:  # else one that came back may be here under its number
            self.resident[expert.id.layer].discard(expert.id.expert)
        expert.weights = None
        self.totals.unused += expert.foreseen
        expert.foreseen = False
        self._free(expert)

    def _free(self, expert: DiskExpert) -> None:
        """Gives an expert's buffer back."""
        assert expert.buffer is not None
        self._arena.give_back(expert.buffer)
        expert.buffer = None
