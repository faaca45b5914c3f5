"""Experts that lie on disk, and the RAM that holds those of them that are used most.

An expert that a request needs is waited for; the caller computes what is here while the rest is read (`Lease`). Room
comes from the expert whose count of uses (use.py) is lowest; what a request or a prefetch holds stays, and so does
what the plan pinned.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from pathlib import Path

from moehive.kernels.geometry import ExpertId, ExpertSpec
from moehive.kernels.ops import ExpertWeights

from ..types import NodeError
from .arena import Arena, padded
from .experts import Ahead, DiskExpert, TierTotals
from .leaving import Leaving
from .reader import NOW, SPARE, DiskReader, Inbox, ReadJob
from .use import HALF_LIFE, LAGS, Chances, Source, Transitions, place_of, used

log = logging.getLogger(__name__)

LEAST_EXPERTS = 4  # that RAM must hold above a disk, beside those pinned: some are computed, some are read
AHEAD_SHARE = 4  # a prefetch may hold at most one part in so many of the RAM
AHEAD_LAYERS = 4  # for which it holds experts, the newest: two layers of each of two micro-batches, which take turns
LIKELY, WORTH = 0.5, 0.3  # chances from which a guess is read in time, and when the disk has nothing else to do
MAYBE = 1 << 40  # due so much later
NOTED_EXPERTS = 64  # of one request: more are a prompt's, after which anything follows


class DiskReadError(NodeError):
    """An expert's file cannot be read any more."""


class RamTier:
    """`capacity_bytes` of RAM over experts on disk. Every method may be called on any thread."""

    def __init__(self, capacity_bytes: int, layers: Collection[int], reader: DiskReader) -> None:
        """`layers`: how many experts each MoE layer of the model has."""
        self.totals = TierTotals()
        self.reader = reader
        self._arena = Arena(capacity_bytes)
        self._lock = threading.RLock()
        self._inbox: Inbox = deque()
        self._reading: dict[ReadJob, DiskExpert] = {}
        self._experts: list[dict[int, DiskExpert]] = [{} for _ in layers]
        self._resident: list[set[int]] = [set() for _ in layers]
        self._leaving = Leaving()
        self._spare: list[DiskExpert] = []  # in line to fill free room; the last one gives way first
        self._transitions = Transitions(list(layers))
        self._chances = Chances()
        self._ahead: OrderedDict[int, Ahead] = OrderedDict()  # by layer, the newest last
        self._unnoted: list[tuple[int, Collection[int], Ahead | None]] = []  # layers, what they asked for
        self._requests = 0

    # What there is

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM that experts take now."""
        return self._arena.taken_bytes

    def resident(self, layer: int) -> frozenset[int]:
        """The experts of a layer that are in RAM."""
        with self._lock:
            self._collect()
            return frozenset(self._resident[layer])

    def on_disk(self, layer: int) -> set[int]:
        """The experts of a layer that would have to be read first."""
        with self._lock:
            self._collect()
            return self._experts[layer].keys() - self._resident[layer]

    def add(self, expert: ExpertId, spec: ExpertSpec, path: Path) -> None:
        """Takes an expert whose checked file of `spec.nbytes` is `path`; it stays on disk until it is asked for."""
        with self._lock:
            known = DiskExpert(expert, spec, path, spec.nbytes, padded(spec.nbytes))
            self._experts[expert.layer].setdefault(expert.expert, known)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert.expert in self._experts[expert.layer]

    def experts(self) -> list[ExpertId]:
        """All that lie on disk here."""
        with self._lock:
            return [expert.id for layer in self._experts for expert in layer.values()]

    def pin(self, experts: Collection[ExpertId]) -> None:
        """From now on these stay in RAM once they are there, and no others.

        As many as leave room for LEAST_EXPERTS that move.
        """
        with self._lock:
            here = [expert for layer in self._experts for expert in layer.values()]
            largest = max((expert.nbytes for expert in here), default=0)
            room = self._arena.capacity_bytes - LEAST_EXPERTS * largest
            for expert in here:
                expert.pinned = expert.id in experts and expert.nbytes <= room
                if expert.pinned:
                    room -= expert.nbytes
                self._may_leave(expert)

    def remove(self, expert: ExpertId) -> None:
        """Forgets an expert; a request that computes with it now goes on."""
        with self._lock:
            gone = self._experts[expert.layer].pop(expert.expert, None)
            if gone is None:
                return
            self._resident[expert.layer].discard(expert.expert)
            gone.pinned = False
            self._may_leave(gone)

    def fill(self) -> None:
        """Reads the pinned experts, then others into the room that is free; returns when they are in line."""
        with self._lock:
            wanted = [e for layer in self._experts for e in layer.values() if e.weights is None and e.job is None]
            wanted.sort(key=lambda e: (not e.pinned, e.id.expert, e.id.layer))
            for expert in wanted:
                if not self._read(expert, self._requests if expert.pinned else SPARE):
                    break
                if not expert.pinned:
                    self._spare.append(expert)

    def settle(self) -> None:
        """Waits until nothing is being read."""
        while True:
            with self._lock:
                seen = self.reader.news
                self._collect()
                if not self._reading:
                    return
            self.reader.wait(seen)

    # Use

    def lease(self, layer: int, experts: Collection[int]) -> "Lease":
        """Asks for experts of a layer: those in RAM stay, the others are read. Raises KeyError(number)."""
        with self._lock:
            self._collect()
            known = self._experts[layer]
            wanted = [known[number] for number in sorted(experts)]
            self._requests += 1
            for expert in wanted:
                self._touch(expert)
            lease = Lease(self, wanted)
            ahead = self._ahead.pop(layer, None)
            if ahead is not None:
                self._passed(ahead)
            lease.read()
            self._note()
            if len(experts) <= NOTED_EXPERTS:  # noted while the disk is waited for, at the latest with the next one
                self._unnoted.append((layer, experts, ahead))
            return lease

    def prefetch(self, layer: int, likely: Sequence[Sequence[int]], chosen: int) -> None:
        """While the experts leased last, of `layer`, are computed: reads those that the next layers will ask for.

        `likely`: the coordinator's guess for the next layer, the one after, and so on, each likeliest first; a router
        would choose `chosen`. For a layer without a guess counts what followed before. What is read, and when,
        follows from how often such guesses came true, and from how busy the disk is.
        """
        with self._lock:
            busy = self.reader.busy()
            # In vain, a read takes the disk from another one as often as it is busy. Else it saves about half of its
            # time: the other half would have passed while the experts in RAM are computed.
            worth = max(WORTH, busy / (busy + 0.5))
            for distance in range(1, max(LAGS, len(likely)) + 1):
                guess = likely[distance - 1] if distance <= len(likely) else ()
                source = bool(guess), distance
                if not guess:
                    self._note()
                    guess = self._transitions.likely(layer, distance)
                self._foresee(layer, source, guess, chosen, worth)

    # Below, the lock is held

    def _collect(self) -> None:
        """Takes what was read meanwhile."""
        self.reader.collect()
        while self._inbox:
            self._arrived(self._inbox.popleft())

    def _note(self) -> None:
        """Counts what the last requests asked for."""
        for layer, experts, ahead in self._unnoted:
            self._transitions.note(layer, experts)
            if ahead is not None:
                self._chances.note(ahead.guesses, experts)
        self._unnoted.clear()

    def _foresee(self, layer: int, source: Source, guess: Sequence[int], chosen: int, worth: float) -> None:
        """Reads and holds what of a guess made at `layer` has a chance of `worth`, in place of the last guess."""
        layer = (layer + source[1]) % len(self._experts)
        known, due = self._experts[layer], self._requests + source[1]
        former = self._ahead.pop(layer, None)
        while len(self._ahead) >= AHEAD_LAYERS:
            self._passed(self._ahead.popitem(last=False)[1])
        ahead = self._ahead[layer] = Ahead(guesses=former.guesses if former is not None else {})
        places = ahead.guesses[source] = []
        chances = self._chances.of(source)
        room = self._arena.capacity_bytes // AHEAD_SHARE - sum(other.nbytes for other in self._ahead.values())
        for rank, number in enumerate(dict.fromkeys(guess)):
            expert = known.get(number)
            if expert is None:
                continue
            place = place_of(rank, chosen)
            places.append((number, place))
            if chances[place] < worth or ahead.nbytes + expert.nbytes > room:
                continue
            when = due if chances[place] >= LIKELY else MAYBE + due
            if expert.job is not None:
                self._hurry(expert, when)
            elif expert.weights is None:
                if not self._read(expert, when):
                    break
                expert.foreseen = True
                self.totals.prefetches += 1
            expert.held += 1
            ahead.experts.append(expert)
            ahead.nbytes += expert.nbytes
        self._let_go(former)

    def _touch(self, expert: DiskExpert) -> None:
        expert.count = used(expert.count, self._requests / (HALF_LIFE * len(self._experts)))
        self.totals.lookups += 1
        if expert.weights is not None:
            self.totals.here += 1
            self.totals.foreseen += expert.foreseen
        elif expert.job is not None:
            self.totals.late += expert.foreseen
        expert.foreseen = False

    def _passed(self, ahead: Ahead) -> None:
        """A layer's request is there, or never came: the end of what was foreseen for it."""
        self._let_go(ahead)
        for expert in ahead.experts:
            self.totals.unused += expert.foreseen
            expert.foreseen = False

    def _let_go(self, ahead: Ahead | None) -> None:
        """The end of what a prefetch held. What is not begun is taken out of line."""
        for expert in ahead.experts if ahead is not None else ():
            expert.held -= 1
            if not expert.held and not expert.pinned and self._cancel(expert):
                self.totals.prefetches -= expert.foreseen
                expert.foreseen = False
                self.reader.wake()
            self._may_leave(expert)

    def _cancel(self, expert: DiskExpert) -> bool:
        """Takes an expert out of line and its buffer back; False when it is not in line, or its reading has begun."""
        job = expert.job
        if job is None or not self.reader.cancel(job):
            return False
        self._end(expert, job)
        self._free(expert)
        return True

    def _read(self, expert: DiskExpert, due: int) -> bool:
        """Begins to read an expert; False when there is no room."""
        while (buffer := self._arena.take(expert.nbytes)) is None:
            if due == SPARE or not self._evict(due):
                return False
        job = ReadJob(expert.path, buffer.memory, expert.file_bytes, self._inbox)
        expert.buffer, expert.job, expert.due = buffer, job, due
        self._reading[job] = expert
        self.reader.read(job, due)
        return True

    def _hurry(self, expert: DiskExpert, due: int) -> None:
        """An expert that is being read may have become more urgent."""
        if expert.job is not None and due < expert.due:
            expert.due = due
            self.reader.move(expert.job, due)

    def _end(self, expert: DiskExpert, job: ReadJob) -> None:
        expert.job = None
        del self._reading[job]

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
            if self._experts[expert.id.layer].get(expert.id.expert) is expert:
                self._resident[expert.id.layer].add(expert.id.expert)
        else:
            expert.error = job.error
            self._free(expert)
        self._may_leave(expert)

    def _may_leave(self, expert: DiskExpert) -> None:
        """Puts an expert that nobody holds among those that make room."""
        if expert.held or expert.pinned or expert.weights is None:
            return
        if self._experts[expert.id.layer].get(expert.id.expert) is not expert:
            self._drop(expert)  # it was removed meanwhile
        else:
            self._leaving.put(expert)

    def _evict(self, due: int) -> bool:
        """Makes room by what only waits to fill it, else by the expert that is used least; False: all are held."""
        while self._spare:
            expert = self._spare.pop()
            if expert.due == SPARE and not (expert.held or expert.pinned) and self._cancel(expert):
                return True
        if (least := self._leaving.take()) is not None:
            self._drop(least)
            return True
        if due == NOW and self._ahead:  # guesses give way
            self._let_go(self._ahead.popitem()[1])
            return True  # there may be room now
        return False

    def _drop(self, expert: DiskExpert) -> None:
        self._resident[expert.id.layer].discard(expert.id.expert)
        expert.weights = None
        self.totals.unused += expert.foreseen
        expert.foreseen = False
        self._free(expert)

    def _free(self, expert: DiskExpert) -> None:
        """Gives an expert's buffer back."""
        assert expert.buffer is not None
        self._arena.give_back(expert.buffer)
        expert.buffer = None


class Lease:
    """Experts of one request, in groups as they come: `for group in lease`, each {number: weights}.

    A group is good until the next one; `close` gives back what is held, also of groups that were not taken.
    """

    def __init__(self, tier: RamTier, wanted: list[DiskExpert]) -> None:
        """Holds the experts. The tier's lock is held."""
        self._tier = tier
        self._wanted = wanted  # yet to come
        self._group: list[DiskExpert] = []
        for expert in wanted:
            expert.held += 1
            tier._hurry(expert, NOW)

    @property
    def whole(self) -> bool:
        """Whether all are here, so that the first group is the only one."""
        return all(expert.weights is not None for expert in self._wanted)

    def __iter__(self) -> "Lease":
        return self

    def __next__(self) -> dict[int, ExpertWeights]:
        """Waits for the next experts. Raises DiskReadError."""
        tier = self._tier
        while True:
            with tier._lock:
                self._give_back()
                if not self._wanted:
                    raise StopIteration
                seen = tier.reader.news
                tier._collect()
                self._group = [expert for expert in self._wanted if expert.weights is not None]
                self._wanted = [expert for expert in self._wanted if expert.weights is None]
                self.read()
                if self._group:
                    return {e.id.expert: e.weights for e in self._group if e.weights is not None}
                self._raise_error()
                tier._note()
            tier.reader.wait(seen)

    def close(self) -> None:
        """The end of the request."""
        with self._tier._lock:
            self._group += self._wanted
            self._wanted = []
            self._give_back()

    def read(self) -> None:
        """Begins to read what is not here, as far as there is room. The tier's lock is held."""
        for expert in self._wanted:
            idle = expert.weights is None and expert.job is None and expert.error is None
            if idle and not self._tier._read(expert, NOW):
                return

    def _raise_error(self) -> None:
        for expert in self._wanted:
            error, expert.error = expert.error, None  # the next request tries again
            if error is not None:
                raise DiskReadError(
                    f"The experts' cache cannot be read ({error}): check that disk, then start this node again."
                )

    def _give_back(self) -> None:
        for expert in self._group:
            expert.held -= 1
            self._tier._may_leave(expert)
        if self._group:
            self._tier.reader.wake()  # who waits for room
        self._group = []
