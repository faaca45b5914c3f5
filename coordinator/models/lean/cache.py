"""The lean trunk's memory of each sequence: a KV cache in pages, and states of a fixed size.

A page holds the keys and values of `PAGE` tokens in all layers of a group. Layers with the same sliding window are a
group; a group with a window gives back the pages that fell behind it. Layers of other kinds keep states instead
(recurrent, convolution), whose size does not depend on the sequence's length.
"""

import ctypes
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels.memory import large_pages
from moehive.kernels.trunk_ops import PAGE

_CPU = torch.device("cpu")
_SLAB_BYTES = 16 << 20  # of pages that are taken from the system at a time
_KEPT_BYTES = 64 << 20  # of slabs of a pool that nobody uses; more go back to the system


@dataclass(slots=True, eq=False)
class Slab:
    """Pages in one piece of memory: a decoding core that streams keys from small ones waits for addresses."""

    pages: int
    free: list[torch.Tensor]


@dataclass(slots=True)
class PageMemory:
    """Pages of one size, which all groups of layers that have it share: what one gives back another may take."""

    page_bytes: int
    device: torch.device = _CPU
    _slabs: list[Slab] = field(default_factory=list)  # that have free pages
    _taken: dict[int, Slab] = field(default_factory=dict)  # by a page's address

    @property
    def slab_bytes(self) -> int:
        """Bytes that are taken from the system at a time: whole pages, at least one."""
        return max(1, _SLAB_BYTES // self.page_bytes) * self.page_bytes

    def take(self) -> torch.Tensor:
        """A page, uint8 [page_bytes] aligned to 64; what it holds is undefined."""
        if not self._slabs:
            nbytes = self.slab_bytes
            on_cpu = self.device.type == "cpu"
            memory = large_pages(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            pages = list(reversed(memory.split(self.page_bytes)))
            self._slabs.append(Slab(len(pages), pages))
        slab = self._slabs[-1]
        page = slab.free.pop()
        if not slab.free:
            self._slabs.pop()
        self._taken[page.data_ptr()] = slab
        return page

    def give(self, page: torch.Tensor) -> None:
        """Takes a page back."""
        slab = self._taken.pop(page.data_ptr())
        slab.free.append(page)
        if len(slab.free) == 1:
            self._slabs.append(slab)
        if len(slab.free) == slab.pages:
            unused = sum(one.pages for one in self._slabs if len(one.free) == one.pages)
            self._slabs.remove(slab)
            if unused * self.page_bytes <= _KEPT_BYTES:
                self._slabs.insert(0, slab)  # those that are in use go first

    @property
    def used(self) -> int:
        """Pages that sequences have."""
        return len(self._taken)


@dataclass(slots=True)
class PagePool:
    """The pages of one group of layers."""

    window: int | None  # keys that a query sees, itself included; None: all
    page_bytes: int = 0  # grows while layers are added

    def pages(self, tokens: int, chunk: int) -> int:
        """Pages that a sequence of `tokens`, run at most `chunk` at a time, holds at its most."""
        if self.window is not None:
            tokens = min(tokens, self.window + chunk + PAGE)
        return -(-tokens // PAGE)


class PageTable:
    """One sequence's pages in one pool."""

    def __init__(self, pool: PagePool, memory: PageMemory) -> None:
        self._pool = pool
        self._memory = memory
        self._pages: list[torch.Tensor | None] = []
        self._addresses = (ctypes.c_uint64 * 8)()
        self._behind = 0  # pages that were given back

    @property
    def address(self) -> int:
        """Of the pages' addresses; until the next `extend`."""
        return ctypes.addressof(self._addresses)

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """The pages' addresses, 0 for those that were given back; until the next `extend`."""
        return np.frombuffer(memoryview(self._addresses), np.int64, len(self._pages))

    @property
    def nbytes(self) -> int:
        """Of the pages that it holds."""
        return (len(self._pages) - self._behind) * self._pool.page_bytes

    def extend(self, tokens: int) -> None:
        """Room for `tokens` in all."""
        wanted = -(-tokens // PAGE)
        if wanted > len(self._addresses):
            larger = (ctypes.c_uint64 * (2 * wanted))()
            ctypes.memmove(larger, self._addresses, ctypes.sizeof(self._addresses))
            self._addresses = larger
        while len(self._pages) < wanted:
            page = self._memory.take()
            self._addresses[len(self._pages)] = page.data_ptr()
            self._pages.append(page)

    def drop_behind(self, tokens: int) -> None:
        """Gives back what no token from position `tokens` on sees."""
        if self._pool.window is None:
            return
        seen = max(0, tokens - self._pool.window + 1) // PAGE
        self._give_back(min(seen, len(self._pages)))

    def clear(self) -> None:
        """Gives all pages back."""
        self._give_back(len(self._pages))
        self._pages = []
        self._behind = 0

    def _give_back(self, before: int) -> None:
        for index in range(self._behind, before):
            page = self._pages[index]
            assert page is not None
            self._pages[index] = None
            self._addresses[index] = 0
            self._memory.give(page)
        self._behind = max(self._behind, before)


@dataclass(slots=True, eq=False)
class SequenceCache:
    """What one sequence keeps between forward passes."""

    tables: list[PageTable]
    states: list[torch.Tensor]
    tokens: int = 0  # that have been run
    addresses: ctypes.Array[ctypes.c_uint64] = field(init=False)  # of the states

    def __post_init__(self) -> None:
        self.addresses = (ctypes.c_uint64 * len(self.states))(*[state.data_ptr() for state in self.states])

    def clear(self) -> None:
        """Gives the pages back to their pools."""
        for table in self.tables:
            table.clear()
        self.states = []


class CacheLayout:
    """What all layers keep of a sequence; each says its part while the trunk is built."""

    def __init__(self) -> None:
        self.pools: list[PagePool] = []
        self.memories: dict[int, PageMemory] = {}  # by the size of their pages
        self._states: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._device = _CPU

    @property
    def states(self) -> int:
        """How many tensors of a fixed size a sequence has."""
        return len(self._states)

    def on(self, device: torch.device) -> "CacheLayout":
        """The same for sequences whose pages and states lie on `device`."""
        other = CacheLayout()
        other.pools = [PagePool(pool.window, pool.page_bytes) for pool in self.pools]
        other._states, other._device = list(self._states), device
        return other

    def group(self, window: int | None) -> int:
        """The index of the pool (and of the sequences' tables) for layers with this window."""
        for index, pool in enumerate(self.pools):
            if pool.window == window:
                return index
        self.pools.append(PagePool(window))
        return len(self.pools) - 1

    def page_end(self, group: int) -> int:
        """Where the next part of a group's pages begins, in bytes; a multiple of 64."""
        return self.pools[group].page_bytes

    def add_to_page(self, group: int, nbytes: int) -> None:
        """Reserves a part of each of a group's pages, at `page_end`."""
        self.pools[group].page_bytes += -(-nbytes // 64) * 64

    def add_state(self, *shape: int, dtype: torch.dtype = torch.float32) -> int:
        """Reserves a tensor of zeros for each sequence; its index in `SequenceCache.states`."""
        self._states.append((shape, dtype))
        return len(self._states) - 1

    def new(self) -> SequenceCache:
        """An empty cache."""
        states = [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in self._states]
        return SequenceCache([PageTable(pool, self._memory(pool.page_bytes)) for pool in self.pools], states)

    def nbytes(self, tokens: int, chunk: int) -> int:
        """Bytes of a sequence of `tokens`, run at most `chunk` at a time."""
        states = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._states)
        return states + sum(pool.pages(tokens, chunk) * pool.page_bytes for pool in self.pools)

    @property
    def slab_bytes(self) -> int:
        """Bytes that pages take at most beyond the largest use of each size so far: a slab, for one page of it."""
        return sum(self._memory(size).slab_bytes for size in {pool.page_bytes for pool in self.pools})

    def _memory(self, page_bytes: int) -> PageMemory:
        """The same for all groups whose pages have this size; made once all layers were added."""
        if page_bytes not in self.memories:
            self.memories[page_bytes] = PageMemory(page_bytes, self._device)
        return self.memories[page_bytes]
