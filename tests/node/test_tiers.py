"""Experts on disk with RAM over them: the same answers from whichever tier, and never more RAM than allowed."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.expert_node.executor import Executor
from moehive.expert_node.store import ExpertStore, StoreFull
from moehive.expert_node.tiers.arena import Arena, padded
from moehive.expert_node.tiers.lease import DiskReadError
from moehive.expert_node.tiers.ram import RamTier
from moehive.expert_node.tiers.reader import THREADS, DiskReader
from moehive.expert_node.tiers.use import used
from moehive.kernels.geometry import ExpertId, ExpertSpec
from moehive.kernels.ops import ExpertOps, Reduction, load_expert
from moehive.proto.tensors import Routing

LAYERS, EXPERTS, HIDDEN = 3, 16, 64


def spec_of(fmt):
    return ExpertSpec(hidden_size=HIDDEN, intermediate_size=96, activation="silu", format=fmt)


@pytest.fixture(scope="module", params=["bf16", "q4_0", "f32"])
def stores(request, model_class, tmp_path_factory):
    """A store with all in RAM, and a function that makes one with room for some, of the same experts."""
    model = model_class.random(spec_of(request.param), LAYERS, EXPERTS)
    folder = tmp_path_factory.mktemp("experts")
    for expert, blob in model.blobs.items():
        path_of(folder, expert).write_bytes(blob.numpy().tobytes())

    def store(room):
        size = padded(model.manifest.layers[0].spec.nbytes)
        made = ExpertStore(room * size, model.manifest.total_bytes)
        made.use(model.manifest, 1)
        made.make_room(model.manifest.total_bytes, ())
        for expert, blob in model.blobs.items():
            weights = load_expert(model.manifest.layers[0].spec, blob)
            made.add(expert, weights, path_of(folder, expert))
        return made

    return store(LAYERS * EXPERTS), store, folder


def executors(*stores):
    ops = ExpertOps(1)
    return [Executor(store, ops) for store in stores]


def path_of(folder: Path, expert: ExpertId) -> Path:
    return folder / f"{expert.layer}-{expert.expert}.expert"


def random_request(rng, tokens, k, dtype):
    hidden = torch.from_numpy(rng.standard_normal((tokens, HIDDEN), dtype=np.float32)).to(dtype)
    experts = np.concatenate([rng.choice(EXPERTS, k, replace=False) for _ in range(tokens)]).astype(np.uint32)
    offsets = np.arange(0, tokens * k + 1, k, dtype=np.uint32)
    return hidden, Routing(offsets, experts, rng.random(tokens * k, dtype=np.float32))


@pytest.mark.parametrize("room", [4, 9, 40])
def test_the_tier_does_not_change_a_bit(stores, room):
    whole, make, _ = stores
    small = make(room)
    small.prepare()
    in_ram, tiered = executors(whole, small)
    rng = np.random.default_rng(room)
    for step in range(36):
        tokens, k = [(1, 4), (5, 2), (40, 8)][int(rng.integers(3))]  # the last: more experts than the RAM holds
        hidden, routing = random_request(rng, tokens, k, [torch.float32, torch.bfloat16][step % 2])
        reduction = [Reduction.PARTIAL_SUM, Reduction.PER_EXPERT][int(rng.integers(2))]
        layer, likely = step % LAYERS, rng.integers(0, 2 * EXPERTS, (step % 3, 5)).tolist()
        expected, _ = in_ram.compute(layer, hidden, routing, reduction)
        got, _ = tiered.compute(layer, hidden, routing, reduction, likely)
        assert torch.equal(got, expected)
        assert small.ram_bytes <= small.capacity_bytes
        if step % 2:
            small.tier.settle()  # what was read ahead is there before it is asked for
    totals = small.tier.totals
    assert totals.here < totals.lookups
    assert (totals.here > 0 and totals.foreseen > 0) or room == 4  # which the request at hand takes alone
    assert small.bytes_held == whole.bytes_held and small.experts_held == LAYERS * EXPERTS


def test_threads_share_the_ram(stores):
    whole, make, _ = stores
    small = make(4)
    in_ram, tiered = executors(whole, small)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for step in range(20):
            hidden, routing = random_request(rng, 3, 3, torch.float32)
            arguments = (step + seed) % LAYERS, hidden, routing, Reduction.PER_EXPERT
            if not torch.equal(tiered.compute(*arguments)[0], in_ram.compute(*arguments)[0]):
                wrong.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "two requests wait for each other's room"
    assert not wrong


def test_what_is_used_most_stays(stores):
    _, make, _ = stores
    small = make(8)
    tier = small.tier
    for step in range(200):  # four experts again and again, and each time others once
        tier.lease(0, [1, 2, 3, 4, 5 + step % 11]).close()
        tier.settle()
    assert {1, 2, 3, 4} <= tier.resident(0)


def test_pinned_experts_stay(stores):
    _, make, _ = stores
    small = make(6)
    tier = small.tier
    tier.pin({ExpertId(1, 0), ExpertId(1, 1)})
    small.prepare()
    tier.settle()
    assert tier.resident(1) >= {0, 1}
    for step in range(60):
        tier.lease(step % LAYERS, [3 + step % 10]).close()
    tier.settle()
    assert tier.resident(1) >= {0, 1}
    tier.pin(())
    for step in range(60):
        tier.lease(0, [3 + step % 10]).close()
        tier.settle()
    assert not tier.resident(1) & {0, 1}


def test_pins_leave_room_for_the_others_and_answers_stay(stores):
    whole, make, _ = stores
    small = make(7)
    everything = frozenset(small.tier.experts())
    small.pin(everything, frozenset())
    small.prepare()
    small.tier.settle()
    stays = [small.tier.resident(layer) for layer in range(LAYERS)]
    in_ram, tiered = executors(whole, small)
    rng = np.random.default_rng(7)
    for step in range(12):
        hidden, routing = random_request(rng, 5, 2, torch.float32)
        arguments = step % LAYERS, hidden, routing, Reduction.PER_EXPERT
        assert torch.equal(tiered.compute(*arguments)[0], in_ram.compute(*arguments)[0])
    small.tier.settle()
    kept = [before & small.tier.resident(layer) for layer, before in enumerate(stays)]
    assert sum(map(len, kept)) >= 7 - 4
    assert small.ram_bytes <= small.capacity_bytes


def test_pins_hold_when_the_slice_outgrows_the_ram(stores):
    whole, _, folder = stores
    store = ExpertStore(6 * padded(whole.spec(0).nbytes), whole.bytes_held)
    store.use(whole.manifest, 1)
    for number in range(2):
        store.add(ExpertId(0, number), whole.layer(0)[number], path_of(folder, ExpertId(0, number)))
    store.pin(frozenset({ExpertId(0, 1)}), frozenset())
    store.make_room(8 * whole.spec(0).nbytes, {ExpertId(0, 0), ExpertId(0, 1)})
    for number in range(2, 10):
        store.add(ExpertId(0, number), whole.layer(0)[number], path_of(folder, ExpertId(0, number)))
    store.prepare()
    for number in (0, 2, 3, 4, 5, 6, 7, 8, 9, 0, 2, 3):
        store.tier.lease(0, [number]).close()
        store.tier.settle()
    assert 1 in store.tier.resident(0)


def test_a_slice_that_shrinks_and_grows(stores):
    whole, make, _ = stores
    small = make(8)
    small.prepare()
    small.tier.settle()
    kept = frozenset(ExpertId(layer, number) for layer in range(LAYERS) for number in range(4))
    assert small.retain(kept) == LAYERS * (EXPERTS - 4)
    assert small.bytes_held == len(kept) * whole.spec(0).nbytes
    assert ExpertId(0, 3) in small and ExpertId(0, 4) not in small
    hidden, routing = random_request(np.random.default_rng(0), 1, 16, torch.float32)
    with pytest.raises(KeyError):
        executors(small)[0].compute(0, hidden, routing, Reduction.PARTIAL_SUM)


def test_an_expert_that_comes_back_while_a_request_computes_with_the_former_one(stores):
    whole, make, folder = stores
    tier, expert = make(8).tier, ExpertId(0, 1)
    computing = tier.lease(0, [1])
    next(computing)
    tier.remove(expert)
    tier.add(expert, whole.spec(0), path_of(folder, expert))
    tier.lease(0, [1]).close()
    tier.settle()
    computing.close()
    assert 1 in tier.resident(0) and 1 not in tier.on_disk(0)


def test_too_little_of_both(model_class):
    model = model_class.random(spec_of("f32"), LAYERS, EXPERTS)
    nbytes = model.manifest.total_bytes
    for ram, disk in ((nbytes // 2, 0), (nbytes // 2, nbytes // 3), (nbytes // 20, nbytes)):
        store = ExpertStore(ram, disk)
        store.use(model.manifest, 1)
        with pytest.raises(StoreFull, match="--memory"):
            store.make_room(nbytes, ())


def test_a_file_that_is_gone_is_an_error_and_not_a_wait(stores, tmp_path):
    whole, _, folder = stores
    store = ExpertStore(4 * padded(whole.spec(0).nbytes), whole.bytes_held)
    store.use(whole.manifest, 1)
    store.make_room(whole.bytes_held, ())
    for number, name in enumerate(("missing", "short")):
        path = tmp_path / name
        if name == "short":
            path.write_bytes(path_of(folder, ExpertId(0, 0)).read_bytes()[:100])
        store.add(ExpertId(0, number), whole.layer(0)[number], path)
        lease = store.tier.lease(0, [number])
        with pytest.raises(DiskReadError, match="cache cannot be read"):
            next(lease)
        lease.close()
    assert store.ram_bytes == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50_000)), max_size=60))
@settings(max_examples=50, deadline=None)
def test_the_arena_never_gives_more_than_it_has(steps):
    arena = Arena(200_000)
    out = []
    for take, nbytes in steps:
        if take:
            buffer = arena.take(nbytes)
            if buffer is not None:
                assert buffer.nbytes == padded(nbytes) and buffer.memory.data_ptr() % 4096 == 0
                out.append(buffer)
            else:
                assert sum(b.nbytes for b in out) + padded(nbytes) > 200_000
        elif out:
            arena.give_back(out.pop())
        assert arena.taken_bytes == sum(b.nbytes for b in out) <= 200_000


def test_old_uses_fade():
    assert used(float("-inf"), 3.0) == 3.0
    twice = used(used(float("-inf"), 0.0), 0.0)
    assert twice == 1.0  # two uses at 0 weigh as much as one at 1 half-life
    assert used(float("-inf"), 1.5) > twice > used(float("-inf"), 0.5)
    assert used(5.0, 5.0) == 6.0 and used(9.0, 0.0) > 9.0


def test_what_only_fills_free_room_makes_way_first(tmp_path):
    spec = spec_of("f32")
    reader = DiskReader()
    reader.direct = False  # with O_DIRECT a pipe is opened twice
    tier = RamTier(8 * padded(spec.nbytes), [EXPERTS], reader)
    for number in range(EXPERTS):
        path = path_of(tmp_path, ExpertId(0, number))
        if number < THREADS:
            os.mkfifo(path)  # holds up the thread that opens it
        else:
            path.write_bytes(bytes(spec.nbytes))
        tier.add(ExpertId(0, number), spec, path)
    tier.lease(0, [14, 15]).close()
    tier.settle()
    tier.fill()
    assert tier.ram_bytes == 8 * padded(spec.nbytes)
    lease = tier.lease(0, [12, 13])  # in place of two that are in line
    assert tier.resident(0) == {14, 15}
    for number in range(THREADS):
        os.close(os.open(path_of(tmp_path, ExpertId(0, number)), os.O_WRONLY))
    came = {number for group in lease for number in group}
    lease.close()
    tier.settle()
    assert came == {12, 13} and tier.resident(0) >= {12, 13, 14, 15}
    reader.close()
