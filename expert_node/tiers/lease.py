"""The experts of one request, held from when it asks until it has computed, and handed out as they come from disk."""

from moehive.kernels.ops import ExpertWeights

from ..types import NodeError
from .experts import DiskExpert
from .prefetch import Prefetcher
from .reader import NOW
from .room import Room


class DiskReadError(NodeError):
    """An expert's file cannot be read any more."""


class Lease:
    """Experts of one request, in groups as they come: `for group in lease`, each {number: weights}.

    A group is good until the next one; `close` gives back what is held, also of groups that were not taken.
    """

    def __init__(self, room: Room, prefetcher: Prefetcher, wanted: list[DiskExpert]) -> None:
        """Counts a use of the experts and holds them. The room's lock is held."""
        self._room = room
        self._prefetcher = prefetcher
        self._wanted = wanted  # yet to come
        self._group: list[DiskExpert] = []
        for expert in wanted:
            room.touch(expert)
            expert.held += 1
            room.hurry(expert, NOW)

    @property
    def whole(self) -> bool:
        """Whether all are here, so that the first group is the only one."""
        return all(expert.weights is not None for expert in self._wanted)

    def __iter__(self) -> "Lease":
        return self

    def __next__(self) -> dict[int, ExpertWeights]:
        """Waits for the next experts. Raises DiskReadError."""
        room = self._room
        while True:
            with room.lock:
                self._give_back()
                if not self._wanted:
                    raise StopIteration
                seen = room.reader.news
                room.collect()
                self._group = [expert for expert in self._wanted if expert.weights is not None]
                self._wanted = [expert for expert in self._wanted if expert.weights is None]
                self.read()
                if self._group:
                    return {e.id.expert: e.weights for e in self._group if e.weights is not None}
                self._raise_error()
                self._prefetcher.note()
            room.reader.wait(seen)

    def close(self) -> None:
        """The end of the request."""
        with self._room.lock:
            self._group += self._wanted
            self._wanted = []
            self._give_back()

    def read(self) -> None:
        """Begins to read what is not here, as far as there is room, also in place of guesses. The lock is held."""
        for expert in self._wanted:
            if expert.weights is None and expert.job is None and expert.error is None:
                while not self._room.read(expert, NOW):
                    if not self._prefetcher.give_way():
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
            self._room.may_leave(expert)
        if self._group:
            self._room.reader.wake()  # who waits for room
        self._group = []
