"""Experts that lie on disk, and the RAM that holds those of them that are used most.

A request leases its experts (lease.py) and computes what is here while the rest is read; what the next layers may ask
for is read meanwhile (prefetch.py). Both share one room (room.py), and this tier takes its lock.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from moehive.kernels.geometry import ExpertId, ExpertSpec

from .arena import padded
from .experts import DiskExpert
from .lease import Lease
from .prefetch import Elsewhere, Prefetcher, nowhere
from .reader import DiskReader
from .room import Room

LEAST_EXPERTS = 4  # that RAM must hold above a disk, beside those pinned: some are computed, some are read


class RamTier:
    """`capacity_bytes` of RAM over experts on disk. Every method may be called on any thread."""

    def __init__(self, capacity_bytes: int, layers: Sequence[int], reader: DiskReader) -> None:
        """`layers`: how many experts each MoE layer of the model has."""
        self.reader = reader
        self._experts: list[dict[int, DiskExpert]] = [{} for _ in layers]
        self._room = Room(capacity_bytes, len(layers), reader)
        self._prefetcher = Prefetcher(self._room, self._experts, layers)
        self.totals = self._room.totals

    # What there is

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM that experts take now."""
        return self._room.taken_bytes

    def resident(self, layer: int) -> frozenset[int]:
        """The experts of a layer that are in RAM."""
        with self._room.lock:
            self._room.collect()
            return frozenset(self._room.resident[layer])

    def on_disk(self, layer: int) -> set[int]:
        """The experts of a layer that would have to be read first."""
        with self._room.lock:
            self._room.collect()
            return self._experts[layer].keys() - self._room.resident[layer]

    def add(self, expert: ExpertId, spec: ExpertSpec, path: Path) -> None:
        """Takes an expert whose checked file of `spec.nbytes` is `path`; it stays on disk until it is asked for."""
        with self._room.lock:
            known = DiskExpert(expert, spec, path, spec.nbytes, padded(spec.nbytes))
            self._experts[expert.layer].setdefault(expert.expert, known)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert.expert in self._experts[expert.layer]

    def experts(self) -> list[ExpertId]:
        """All that lie on disk here."""
        with self._room.lock:
            return [expert.id for layer in self._experts for expert in layer.values()]

    def pin(self, experts: Collection[ExpertId]) -> None:
        """From now on these stay in RAM once they are there, and no others.

        As many as leave room for LEAST_EXPERTS that move.
        """
        with self._room.lock:
            here = [expert for layer in self._experts for expert in layer.values()]
            largest = max((expert.nbytes for expert in here), default=0)
            left = self._room.capacity_bytes - LEAST_EXPERTS * largest
            for expert in here:
                expert.pinned = expert.id in experts and expert.nbytes <= left
                if expert.pinned:
                    left -= expert.nbytes
                self._room.may_leave(expert)

    def remove(self, expert: ExpertId) -> None:
        """Forgets an expert; a request that computes with it now goes on."""
        with self._room.lock:
            gone = self._experts[expert.layer].pop(expert.expert, None)
            if gone is not None:
                self._room.remove(gone)

    def fill(self) -> None:
        """Reads the pinned experts, then others into the room that is free; returns when they are in line."""
        room = self._room
        with room.lock:
            wanted = [e for layer in self._experts for e in layer.values() if e.weights is None and e.job is None]
            wanted.sort(key=lambda e: (not e.pinned, e.id.expert, e.id.layer))
            for expert in wanted:
                if not (room.read(expert, room.requests) if expert.pinned else room.fill_with(expert)):
                    break

    def settle(self) -> None:
        """Waits until nothing is being read."""
        while True:
            with self._room.lock:
                seen = self.reader.news
                self._room.collect()
                if not self._room.reading:
                    return
            self.reader.wait(seen)

    # Use

    def lease(self, layer: int, experts: Collection[int]) -> Lease:
        """Asks for experts of a layer: those in RAM stay, the others are read. Raises KeyError(number)."""
        room, prefetcher = self._room, self._prefetcher
        with room.lock:
            room.collect()
            known = self._experts[layer]
            wanted = [known[number] for number in sorted(experts)]
            room.requests += 1
            lease = Lease(room, prefetcher, wanted)
            ahead = prefetcher.came(layer)
            lease.read()
            prefetcher.asked(layer, experts, ahead)
            return lease

    def prefetch(
        self, layer: int, likely: Sequence[Sequence[int]], chosen: int, elsewhere: Elsewhere = nowhere
    ) -> None:
        """While the experts leased last, of `layer`, are computed: reads those that the next layers will ask for.

        `likely`: the coordinator's guess for the next layer, the one after, and so on, each likeliest first; a router
        would choose `chosen`. For a layer without a guess counts what followed before. What is read, and when,
        follows from how often such guesses came true, and from how busy the disk is; experts that are `elsewhere`
        need not be read.
        """
        with self._room.lock:
            self._prefetcher.prefetch(layer, likely, chosen, elsewhere)
