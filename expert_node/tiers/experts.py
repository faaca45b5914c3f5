"""What the RAM tier knows of an expert, and of how well it does."""

from dataclasses import dataclass
from pathlib import Path

from moehive.kernels.geometry import ExpertId, ExpertSpec
from moehive.kernels.ops import ExpertWeights

from .arena import Buffer
from .reader import SPARE, ReadJob


@dataclass(slots=True, eq=False)
class DiskExpert:
    """An expert whose file is on disk."""

    id: ExpertId
    spec: ExpertSpec
    path: Path
    file_bytes: int
    nbytes: int  # of its buffer: in RAM
    pinned: bool = False
    count: float = float("-inf")  # see `use.used`
    buffer: Buffer | None = None  # while in RAM or being read
    weights: ExpertWeights | None = None  # while in RAM
    job: ReadJob | None = None  # while it is read
    due: int = SPARE  # of `job`
    held: int = 0  # by leases and prefetches: may not leave
    in_heap: bool = False
    foreseen: bool = False  # read ahead, and not used yet
    removed: bool = False  # this node holds it no more
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
