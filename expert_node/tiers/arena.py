"""The RAM of the experts that come and go: buffers that are never more than the allowance in all.

Buffers are anonymous memory, not the page cache, so that what this node gives to experts is what it takes, and a
control group's limit holds. A buffer that is given back stays for the next expert of its size: a new one would be
zeroed by the kernel page by page.
"""

import mmap
from dataclasses import dataclass

import torch

from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.ops import ExpertWeights, load_expert

PAGE = 4096  # bytes; O_DIRECT wants addresses, offsets and sizes in multiples of it
_HUGE = 2 << 20  # bytes of a large page


def padded(nbytes: int) -> int:
    """Bytes of a buffer for an expert of `nbytes`."""
    return -(-nbytes // PAGE) * PAGE


@dataclass(slots=True, eq=False)
class Buffer:
    """`memory` uint8 [whole pages], aligned to a page, of any content at first."""

    memory: torch.Tensor
    _weights: ExpertWeights | None = None  # of the expert that lay here last

    @property
    def nbytes(self) -> int:
        """Whole pages."""
        return self.memory.numel()

    def weights(self, spec: ExpertSpec) -> ExpertWeights:
        """The expert whose bytes lie here, ready to compute. The next one of the same spec gets the same object."""
        if self._weights is None or self._weights.spec is not spec:
            self._weights = load_expert(spec, self.memory[: spec.nbytes])
        return self._weights


class Arena:
    """Buffers for experts, `capacity_bytes` at most together. The caller sees to it that one thread is in here."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.taken_bytes = 0  # of buffers that are in use
        self._kept: dict[int, list[Buffer]] = {}  # by size
        self._kept_bytes = 0

    def take(self, nbytes: int) -> Buffer | None:
        """A buffer of padded(nbytes); None when there is no room."""
        size = padded(nbytes)
        if same := self._kept.get(size):
            self._kept_bytes -= size
            self.taken_bytes += size
            return same.pop()
        if self.taken_bytes + size > self.capacity_bytes:
            return None
        while self.taken_bytes + self._kept_bytes + size > self.capacity_bytes:
            other = next(other for other, buffers in self._kept.items() if buffers)
            self._kept[other].pop()
            self._kept_bytes -= other
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory may have no large pages
        if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.taken_bytes += size
        return Buffer(torch.frombuffer(memory, dtype=torch.uint8))

    def give_back(self, buffer: Buffer) -> None:
        """The end of a buffer's use; nobody may read it any more."""
        size = buffer.nbytes
        self.taken_bytes -= size
        self._kept_bytes += size
        self._kept.setdefault(size, []).append(buffer)
