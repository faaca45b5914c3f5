"""Pages of a KV cache: nobody gets one that another has, and little is taken from the system beyond them."""

import gc
import mmap
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.models.lean import cache
from moehive.coordinator.models.lean.cache import CacheLayout, PageMemory


@given(st.lists(st.integers(-30, 40), min_size=1, max_size=40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_nobody_gets_a_page_that_another_has(changes: list[int], units: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache, "_SLAB_BYTES", 1024)
        patched.setattr(cache, "_KEPT_BYTES", 4096)
        pool = PageMemory(64 * units)
        held: list[torch.Tensor] = []
        most = 0
        for number, change in enumerate(changes):
            for _ in range(change):
                page = pool.take()
                assert page.data_ptr() % 64 == 0 and page.nbytes == pool.page_bytes
                page.fill_(number % 256)
                held.append(page)
                most = max(most, len(held))
            for _ in range(min(-change, len(held))):
                pool.give(held.pop((7 * number) % len(held)))
            assert pool.used == len(held)
            slabs = {id(slab): slab for slab in (*pool._slabs, *pool._taken.values())}.values()
            taken = sum(slab.pages for slab in slabs) * pool.page_bytes
            assert taken < most * pool.page_bytes + pool.slab_bytes
            starts = sorted(page.data_ptr() for page in held)
            assert all(b - a >= pool.page_bytes for a, b in pairwise(starts))
        for page in held:
            pool.give(page)
        spare = sum(len(slab.free) for slab in pool._slabs)
        assert pool.used == 0 and spare * pool.page_bytes <= 4096


def test_what_nobody_has_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    class Watched(mmap.mmap):
        def __init__(self, *_: object) -> None:
            maps.add(self)

    monkeypatch.setattr(mmap, "mmap", Watched)
    pool = PageMemory(9 << 20)  # a slab each, of which seven may be kept
    pages = [pool.take() for _ in range(20)]
    assert len(maps) == 20
    while pages:
        pool.give(pages.pop())
    gc.collect()
    assert len(maps) == 7


def test_groups_with_pages_of_one_size_take_each_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many sequences leave a page in each slab of one group; what the other takes then comes from these slabs."""
    monkeypatch.setattr(cache, "_SLAB_BYTES", 4096)
    layout = CacheLayout()
    for window in (None, 32):
        layout.add_to_page(layout.group(window), 512)
    layout.add_to_page(layout.group(64), 1024)
    assert layout.slab_bytes == 2 * 4096
    sequences = [layout.new() for _ in range(8)]
    for sequence in sequences:
        sequence.tables[0].extend(32)
        sequence.tables[1].extend(7 * 32)  # as if it saw all of them
    memory = layout.memories[512]
    assert memory.used == 64 and not memory._slabs  # of eight pages each, all full
    slabs = set(map(id, memory._taken.values()))
    for sequence in sequences:
        sequence.tables[1].clear()
    sequences[0].tables[0].extend(57 * 32)
    assert memory.used == 64 and set(map(id, memory._taken.values())) == slabs
    assert layout.memories.keys() == {512, 1024} and layout.memories[1024].used == 0
