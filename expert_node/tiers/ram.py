"""Experts that lie on disk, and the RAM that holds those of them that are used most.

An expert that a request needs is waited for; the caller computes what is here while the rest is read (`Lease`). Room
comes from the expert whose count of uses (use.py) is lowest; what a request or a prefetch holds stays, and so does
what the plan pinned.
"""

import heapq
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moehive.kernels.geometry import ExpertId, ExpertSpec
from moehive.kernels.ops import ExpertWeights, load_expert

from ..types import NodeError
from .arena import Arena, padded
from .reader import DiskReader, ReadJob, Urgency
from .use import HALF_LIFE, Transitions, used

log = logging.getLogger(__name__)

LEAST_EXPERTS = 4  # that RAM must hold above a disk, beside those pinned: some are computed, some are read
AHEAD_SHARE = 4  # a prefetch may hold at most one part in so many of the RAM
AHEAD_LAYERS = 2  # for which it holds experts, the newest; requests of two micro-batches take turns
NOTED_EXPERTS = 64  # of one request: more are a prompt's, after which anything follows
LIKELY_SHARE = 0.35  # an expert that followed in so many cases is fetched ahead


class DiskReadError(NodeError):
    """An expert's file cannot be read any more."""


@dataclass(slots=True, eq=False)
class _Expert:
    id: ExpertId
    spec: ExpertSpec
    path: Path
    pinned: bool = False
    count: float = float("-inf")  # see `use.used`
    weights: ExpertWeights | None = None  # while in RAM
    job: ReadJob | None = None  # while it is read
    held: int = 0  # by leases and prefetches: may not leave
    in_heap: bool = False
    foreseen: bool = False  # read ahead, and not used yet
    error: OSError | None = None


@dataclass(slots=True)
class TierTotals:
    """Since start, in experts asked for: `here` were in RAM, of which `foreseen` only thanks to a prefetch."""

    lookups: int = 0
    here: int = 0
    foreseen: int = 0  # in RAM because they were fetched ahead
    late: int = 0  # being fetched ahead, but not there yet
    prefetches: int = 0  # begun
    unused: int = 0  # fetched ahead and dropped, or still not used when their layer came

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were in RAM."""
        return self.here / self.lookups if self.lookups else 0.0


@dataclass(slots=True)
class _Ahead:
    experts: list[_Expert] = field(default_factory=list)
    nbytes: int = 0


class RamTier:
    """`capacity_bytes` of RAM over experts on disk. Every method may be called on any thread."""

    def __init__(self, capacity_bytes: int, layers: Collection[int], reader: DiskReader) -> None:
        """`layers`: how many experts each MoE layer of the model has."""
        self.totals = TierTotals()
        self.reader = reader
        self._arena = Arena(capacity_bytes)
        self._changed = threading.Condition(threading.RLock())
        self._experts: list[dict[int, _Expert]] = [{} for _ in layers]
        self._resident: list[frozenset[int]] = [frozenset() for _ in layers]
        self._heap: list[tuple[float, int, _Expert]] = []
        self._order = itertools.count()
        self._transitions = Transitions(list(layers))
        self._ahead: OrderedDict[int, _Ahead] = OrderedDict()  # by layer, the newest last
        self._time = 0.0  # half-lives

    # What there is

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM that experts take now."""
        return self._arena.taken_bytes

    def resident(self, layer: int) -> frozenset[int]:
        """The experts of a layer that are in RAM."""
        return self._resident[layer]

    def on_disk(self, layer: int) -> set[int]:
        """The experts of a layer that would have to be read first."""
        with self._changed:
            return self._experts[layer].keys() - self._resident[layer]

    def add(self, expert: ExpertId, spec: ExpertSpec, path: Path) -> None:
        """Takes an expert whose checked file of `spec.nbytes` is `path`; it stays on disk until it is asked for."""
        with self._changed:
            self._experts[expert.layer].setdefault(expert.expert, _Expert(expert, spec, path))

    def __contains__(self, expert: ExpertId) -> bool:
        return expert.expert in self._experts[expert.layer]

    def experts(self) -> list[ExpertId]:
        """All that lie on disk here."""
        with self._changed:
            return [expert.id for layer in self._experts for expert in layer.values()]

    def pin(self, experts: Collection[ExpertId]) -> None:
        """From now on these stay in RAM once they are there, and no others.

        As many as leave room for LEAST_EXPERTS that move.
        """
        with self._changed:
            here = [expert for layer in self._experts for expert in layer.values()]
            largest = max((padded(expert.spec.nbytes) for expert in here), default=0)
            room = self._arena.capacity_bytes - LEAST_EXPERTS * largest
            for expert in here:
                expert.pinned = expert.id in experts and padded(expert.spec.nbytes) <= room
                if expert.pinned:
                    room -= padded(expert.spec.nbytes)
                self._may_leave(expert)

    def remove(self, expert: ExpertId) -> None:
        """Forgets an expert; a request that computes with it now goes on."""
        with self._changed:
            gone = self._experts[expert.layer].pop(expert.expert, None)
            if gone is None:
                return
            self._resident[expert.layer] -= {expert.expert}
            gone.pinned = False
            self._may_leave(gone)

    def fill(self) -> None:
        """Reads the pinned experts, then others into the room that is free; returns when they are in line."""
        with self._changed:
            wanted = [e for layer in self._experts for e in layer.values() if e.weights is None and e.job is None]
            wanted.sort(key=lambda e: (not e.pinned, e.id.expert, e.id.layer))
            for expert in wanted:
                if not self._read(expert, Urgency.FORESEEN if expert.pinned else Urgency.SPARE):
                    break

    def settle(self) -> None:
        """Waits until nothing is being read."""
        with self._changed:
            self._changed.wait_for(lambda: all(e.job is None for layer in self._experts for e in layer.values()))

    # Use

    def lease(self, layer: int, experts: Collection[int]) -> "Lease":
        """Asks for experts of a layer: those in RAM stay, the others are read. Raises KeyError(number)."""
        with self._changed:
            known = self._experts[layer]
            wanted = [known[number] for number in sorted(experts)]
            self._time += 1 / (HALF_LIFE * len(self._experts))
            if len(experts) <= NOTED_EXPERTS:
                self._transitions.note(layer, experts)
            for expert in wanted:
                self._touch(expert)
            self._let_go(self._ahead.pop(layer, None), used_now=set(experts))
            return Lease(self, wanted)

    def prefetch(self, layer: int, experts: Collection[int], likely: Iterable[int]) -> None:
        """While `experts` of `layer` are computed: reads those that the next layer will ask for.

        `likely`: the coordinator's guess, likeliest first; without one, what followed these experts before.
        """
        with self._changed:
            following = self._transitions.next_layer(layer)
            guess = list(dict.fromkeys(likely)) or self._transitions.likely(layer, experts, LIKELY_SHARE)
            known = self._experts[following]
            former = self._ahead.pop(following, None)
            while len(self._ahead) >= AHEAD_LAYERS:
                self._let_go(self._ahead.popitem(last=False)[1], used_now=set())
            ahead = self._ahead[following] = _Ahead()
            room = self._arena.capacity_bytes // AHEAD_SHARE - sum(other.nbytes for other in self._ahead.values())
            for number in guess:
                expert = known.get(number)
                if expert is None or ahead.nbytes + padded(expert.spec.nbytes) > room:
                    continue
                if expert.job is not None:
                    self.reader.hurry(expert.job, Urgency.FORESEEN)
                elif expert.weights is None:
                    if not self._read(expert, Urgency.FORESEEN):
                        break
                    expert.foreseen = True
                    self.totals.prefetches += 1
                expert.held += 1
                ahead.experts.append(expert)
                ahead.nbytes += padded(expert.spec.nbytes)
            self._let_go(former, used_now={expert.id.expert for expert in ahead.experts})

    # Below, the lock is held

    def _touch(self, expert: _Expert) -> None:
        expert.count = used(expert.count, self._time)
        self.totals.lookups += 1
        if expert.weights is not None:
            self.totals.here += 1
            self.totals.foreseen += expert.foreseen
            expert.foreseen = False
        elif expert.job is not None and expert.foreseen:
            self.totals.late += 1
            expert.foreseen = False

    def _let_go(self, ahead: _Ahead | None, used_now: set[int]) -> None:
        """The end of what a prefetch held. What is not begun is taken out of line."""
        for expert in ahead.experts if ahead is not None else ():
            expert.held -= 1
            if expert.foreseen and expert.id.expert not in used_now:
                self.totals.unused += 1
                expert.foreseen = False
            job = expert.job
            if job is not None and not expert.held and expert.id.expert not in used_now and self.reader.cancel(job):
                expert.job = None
                self._arena.give_back(job.buffer)
                self._changed.notify_all()
            self._may_leave(expert)

    def _read(self, expert: _Expert, urgency: Urgency) -> bool:
        """Begins to read an expert; False when there is no room."""
        nbytes = expert.spec.nbytes
        while (buffer := self._arena.take(nbytes)) is None:
            if urgency is Urgency.SPARE or not self._evict(urgency):
                return False
        job = ReadJob(expert.path, buffer, nbytes, lambda error: self._arrived(expert, error), urgency)
        expert.job = job
        self.reader.read(job)
        return True

    def _arrived(self, expert: _Expert, error: OSError | None) -> None:
        with self._changed:
            job, expert.job = expert.job, None
            assert job is not None
            if error is None:
                expert.weights = load_expert(expert.spec, job.buffer[: job.nbytes])
                if self._experts[expert.id.layer].get(expert.id.expert) is expert:
                    self._resident[expert.id.layer] |= {expert.id.expert}
            else:
                expert.error = error
                self._arena.give_back(job.buffer)
            self._may_leave(expert)
            self._changed.notify_all()

    def _may_leave(self, expert: _Expert) -> None:
        """Puts an expert that nobody holds among those that make room."""
        if expert.held or expert.pinned or expert.weights is None:
            return
        if self._experts[expert.id.layer].get(expert.id.expert) is not expert:
            self._drop(expert)  # it was removed meanwhile
        elif not expert.in_heap:
            expert.in_heap = True
            heapq.heappush(self._heap, (expert.count, next(self._order), expert))

    def _evict(self, urgency: Urgency) -> bool:
        """Drops the expert that is used least; False when all are held."""
        while self._heap:
            count, _, expert = heapq.heappop(self._heap)
            expert.in_heap = False
            if expert.weights is None or expert.held or expert.pinned:
                continue  # comes back by `_may_leave`
            if expert.count > count:  # used since it was put here
                self._may_leave(expert)
                continue
            self._drop(expert)
            return True
        if urgency is Urgency.NEEDED and self._ahead:  # guesses give way
            self._let_go(self._ahead.popitem(last=False)[1], used_now=set())
            return True  # there may be room now
        return False

    def _drop(self, expert: _Expert) -> None:
        assert expert.weights is not None
        self._resident[expert.id.layer] -= {expert.id.expert}
        blob, expert.weights = expert.weights.blob, None
        self.totals.unused += expert.foreseen
        expert.foreseen = False
        self._arena.give_back(_whole(blob))


class Lease:
    """Experts of one request, in groups as they come: `for group in lease`, each {number: weights}.

    A group is good until the next one; `close` gives back what is held, also of groups that were not taken.
    """

    def __init__(self, tier: RamTier, wanted: list[_Expert]) -> None:
        """Holds what is here, and begins to read the rest. The tier's lock is held."""
        self._tier = tier
        self._wanted = wanted  # yet to come
        self._group: list[_Expert] = []
        for expert in wanted:
            expert.held += 1
            if expert.job is not None:
                tier.reader.hurry(expert.job, Urgency.NEEDED)
        self._read_rest()

    @property
    def whole(self) -> bool:
        """Whether all are here, so that the first group is the only one."""
        return all(expert.weights is not None for expert in self._wanted)

    def __iter__(self) -> "Lease":
        return self

    def __next__(self) -> dict[int, ExpertWeights]:
        """Waits for the next experts. Raises DiskReadError."""
        tier = self._tier
        with tier._changed:
            self._give_back()
            while self._wanted:
                self._group = [expert for expert in self._wanted if expert.weights is not None]
                if self._group:
                    self._wanted = [expert for expert in self._wanted if expert.weights is None]
                    self._read_rest()
                    return {e.id.expert: e.weights for e in self._group if e.weights is not None}
                self._read_rest()
                self._raise_error()
                tier._changed.wait()
            raise StopIteration

    def close(self) -> None:
        """The end of the request."""
        with self._tier._changed:
            self._group += self._wanted
            self._wanted = []
            self._give_back()

    def _read_rest(self) -> None:
        for expert in self._wanted:
            idle = expert.weights is None and expert.job is None and expert.error is None
            if idle and not self._tier._read(expert, Urgency.NEEDED):
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
            self._tier._changed.notify_all()
        self._group = []


def _whole(blob: torch.Tensor) -> torch.Tensor:
    """The buffer that a blob is the beginning of."""
    size = padded(blob.numel())
    return torch.as_strided(blob, (size,), (1,))
