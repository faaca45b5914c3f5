"""Which slices are loaded, kept and dropped as the coordinator assigns and commits."""

import asyncio

import pytest
import torch

from moehive.expert_node.download import SliceError
from moehive.expert_node.fetch import Assignment
from moehive.expert_node.slices import Slices
from moehive.expert_node.store import ExpertStore, StoreFull
from moehive.kernels.geometry import ExpertId
from moehive.kernels.manifest import to_bytes
from moehive.kernels.ops import load_expert
from moehive.proto import cluster_pb2 as pb


class Loader:
    """Puts experts into the store, one for each permission."""

    def __init__(self, store, model):
        self.store, self.model = store, model
        self.permits = asyncio.Semaphore(0)

    async def load(self, wanted, keep, progress):
        self.store.use(wanted.manifest, wanted.epoch)
        missing = [e for e in wanted.experts if e not in self.store]
        self.store.make_room(sum(wanted.manifest.nbytes(e) for e in missing), keep)
        for expert in missing:
            await self.permits.acquire()
            spec = self.model.manifest.layers[expert.layer].spec
            self.store.add(expert, load_expert(spec, self.model.blobs[expert]))


def experts(*numbers):
    return tuple(ExpertId(0, number) for number in numbers)


@pytest.fixture
def scene(model):
    """Runs a coroutine function with slices, their store (room for `room` experts), loader and reports."""

    def run(main, room=12):
        async def inside():
            nbytes = model.manifest.layers[0].spec.nbytes
            store = ExpertStore(room * nbytes)
            loader = Loader(store, model)
            reports = asyncio.Queue()

            async def report(epoch, problem):
                await reports.put((epoch, problem))

            slices = Slices(store, loader, report)
            async with asyncio.timeout(20):
                await main(slices, store, loader, reports)
            await slices.stop()
            assert store.bytes_held == store.experts_held * nbytes

        asyncio.run(inside())

    return run


def held(store):
    return sorted(store.layer(0))


def test_the_active_slice_is_loaded_before_the_newest(scene, model):
    async def main(slices, store, loader, reports):
        await slices.assign(Assignment(5, model.manifest, experts(0, 1)))
        await slices.assign(Assignment(6, model.manifest, experts(1, 2)))
        assert not slices.held
        for _ in range(3):
            loader.permits.release()
        assert [await reports.get(), await reports.get()] == [(5, None), (6, None)]
        assert slices.held and held(store) == [0, 1, 2]
        slices.commit(5)  # an old one: the newest is still to come
        assert held(store) == [0, 1, 2]
        slices.commit(6)
        assert held(store) == [1, 2]

    scene(main)


def test_a_superseded_slice_is_broken_off(scene, model):
    async def main(slices, store, loader, reports):
        await slices.assign(Assignment(5, model.manifest, experts(0)))
        loader.permits.release()
        assert await reports.get() == (5, None)
        await slices.assign(Assignment(6, model.manifest, experts(0, 1, 2, 3)))
        await slices.assign(Assignment(7, model.manifest, experts(0, 4)))
        loader.permits.release()
        assert await reports.get() == (7, None)
        assert held(store) == [0, 4]

    scene(main)


def test_a_coordinator_that_comes_back_does_not_begin_anew(scene, model, eventually):
    async def main(slices, store, loader, reports):
        wanted = Assignment(5, model.manifest, experts(0, 1))
        await slices.assign(wanted)
        loader.permits.release()
        await eventually(lambda: held(store))
        slices.forget()
        await slices.assign(Assignment(5, model.manifest, experts(0, 1)))
        assert not slices.held
        loader.permits.release()
        assert await reports.get() == (5, None)
        slices.forget()
        await slices.assign(wanted)
        assert await reports.get() == (5, None)  # without another permission: all was there
        assert slices.held

    scene(main)


def test_room_is_made_for_a_new_plan_but_not_at_the_active_ones_cost(scene, model):
    async def main(slices, store, loader, reports):
        for _ in range(10):
            loader.permits.release()
        await slices.assign(Assignment(1, model.manifest, experts(0, 1, 2)))
        await reports.get()
        await slices.assign(Assignment(2, model.manifest, experts(3, 4)))
        epoch, problem = await reports.get()
        assert epoch == 2 and isinstance(problem, StoreFull) and "--memory" in str(problem)
        assert held(store) == [0, 1, 2] and not slices.held
        slices.forget()  # the coordinator restarts, and has another plan
        await slices.assign(Assignment(3, model.manifest, experts(2, 3, 4)))
        assert await reports.get() == (3, None)
        assert held(store) == [2, 3, 4]

    scene(main, room=4)


def test_another_model_drops_the_first(scene, model, model_class):
    other = model_class.random(model.manifest.layers[0].spec, layers=1, experts=6, seed=9)

    async def main(slices, store, loader, reports):
        for _ in range(10):
            loader.permits.release()
        await slices.assign(Assignment(1, model.manifest, experts(0, 1)))
        await reports.get()
        before = store.layer(0)
        await slices.assign(Assignment(2, other.manifest, experts(1)))
        await reports.get()
        assert held(store) == [1] and store.first_epoch == 2
        assert sorted(before) == [0, 1]  # a computation in hand keeps what it began with
        assert torch.equal(before[1].blob, model.blobs[ExpertId(0, 1)])

    scene(main)


@pytest.mark.parametrize(
    "layers",
    [
        [pb.LayerSlice(layer=2, experts=[0])],
        [pb.LayerSlice(layer=0, experts=[6])],
        [pb.LayerSlice(layer=1, experts=[0]), pb.LayerSlice(layer=0, experts=[0])],
        [pb.LayerSlice(layer=1, experts=[0]), pb.LayerSlice(layer=1, experts=[1])],
    ],
)
def test_assignments_that_contradict_their_manifest(model, layers):
    message = pb.AssignSlice(epoch=1, manifest=to_bytes(model.manifest), layers=layers)
    with pytest.raises(SliceError):
        Assignment.read(message)


def test_assignment_is_read(model):
    layers = [pb.LayerSlice(layer=0, experts=[1, 5]), pb.LayerSlice(layer=1, experts=[0])]
    message = pb.AssignSlice(epoch=9, manifest=to_bytes(model.manifest), layers=layers)
    wanted = Assignment(9, model.manifest, (ExpertId(0, 1), ExpertId(0, 5), ExpertId(1, 0)))
    assert Assignment.read(message) == wanted
    message.manifest = b"nonsense"
    with pytest.raises(SliceError):
        Assignment.read(message)
