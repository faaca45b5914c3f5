"""The time that a trunk spends on its experts: sending what they are asked with, and waiting for their sums."""

from collections.abc import Awaitable, Generator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from ..models.base import ExpertBackend, take_back_of


@dataclass(slots=True)
class TimedBackend:
    """An ExpertBackend that takes the time of another: of sending, and of waiting."""

    backend: ExpertBackend
    sequences: int  # that decode at once
    submitting: float = field(default=0.0)  # seconds
    waiting: float = field(default=0.0)  # seconds in which no pass did anything
    idle_since: float | None = field(default=None)
    layers: int = field(default=0)
    halves: int = field(default=0)  # layers of fewer tokens than there are sequences

    def clear(self) -> None:
        """Begins anew."""
        self.submitting = self.waiting = 0.0
        self.layers = self.halves = 0

    @property
    def split(self) -> float:
        """The share of the layers that not all sequences went through together."""
        return self.halves / max(1, self.layers)

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        """See ExpertBackend.submit."""
        start = perf_counter()
        answer = self.backend.submit(layer, hidden, ids, weights)
        self.submitting += perf_counter() - start
        self.layers += 1
        self.halves += len(hidden) < self.sequences
        return _Answer(self, answer)

    def take_back(self, total: torch.Tensor) -> None:
        """See models.base.take_back_of."""
        if (take_back := take_back_of(self.backend)) is not None:
            take_back(total)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A layer's sum, awaited; passes of the trunk take turns while they wait."""

    timed: TimedBackend
    answer: Awaitable[torch.Tensor]

    def __await__(self) -> Generator[Any, None, torch.Tensor]:
        timed = self.timed
        timed.idle_since = perf_counter()
        total = yield from self.answer.__await__()
        if timed.idle_since is not None:  # else another pass went on meanwhile
            timed.waiting += perf_counter() - timed.idle_since
            timed.idle_since = None
        return total
