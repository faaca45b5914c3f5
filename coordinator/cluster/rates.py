"""How fast each node loads its slice, from what it reports; for a person who waits."""

from collections import deque
from dataclasses import dataclass, field

from ..types import NodeName

WINDOW_SECONDS = 15.0  # a rate is of so long


@dataclass(slots=True)
class _Load:
    """One slice's load: (seconds, bytes done) of the latest reports."""

    epoch: int
    points: deque[tuple[float, int]] = field(default_factory=deque)


class LoadRates:
    """Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._loads: dict[NodeName, _Load] = {}

    def note(self, name: NodeName, epoch: int, bytes_done: int, now: float) -> None:
        """A report of progress; `now` in seconds of any clock that only goes forward."""
        load = self._loads.get(name)
        if load is None or load.epoch != epoch:
            load = self._loads[name] = _Load(epoch)
        load.points.append((now, bytes_done))
        while now - load.points[0][0] > WINDOW_SECONDS and len(load.points) > 2:
            load.points.popleft()

    def forget(self, name: NodeName) -> None:
        """The node's load has ended, or the node is away."""
        self._loads.pop(name, None)

    def rate(self, name: NodeName) -> float:
        """Bytes a second of the load in hand; 0 when there is none or too little is known."""
        load = self._loads.get(name)
        if load is None or len(load.points) < 2:
            return 0.0
        (start, before), (end, after) = load.points[0], load.points[-1]
        return max(0, after - before) / (end - start) if end > start else 0.0
