"""Experts from node to node: each leaves the coordinator once, and a node that dies or lies is done without."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import ClassVar

import grpc
import pytest
import torch
from grpc_channel import open_channel

from moehive.coordinator.types import NodeName, Plan
from moehive.expert_node import download
from moehive.expert_node.sources import SourceChannels
from moehive.kernels.digest import digest_of
from moehive.kernels.geometry import ExpertId
from moehive.proto import chunks, cluster_pb2_grpc
from moehive.proto import cluster_pb2 as pb
from moehive.proto.channel import node_dns_name
from moehive.proto.handshake import metadata

A, B = NodeName("a"), NodeName("b")


def everywhere(capacities, layers, epoch, previous=None):
    """Every node holds every expert."""
    names = tuple(sorted(capacities))
    return Plan(epoch, tuple((names,) * layer.experts for layer in layers))


def asked(coordinator) -> Counter:
    """How often each expert was asked of the coordinator."""
    return Counter((e.layer, e.expert) for request in coordinator.slices.requests for e in request.experts)


def right(coordinator, state) -> bool:
    """Whether a node's cache has the model's bytes, all of them."""
    files = {path.name: path.read_bytes() for path in state.glob("cache/*/*.expert")}
    return files == {
        f"{layer}-{number}.{digest_of(blob.numpy()).hex()}.expert": blob.numpy().tobytes()
        for (layer, number), blob in coordinator.model.blobs.items()
    }


@pytest.fixture
def scene(tmp_path, coordinator_class, authority, model, node_here):
    """Runs a coroutine function with a coordinator whose plans give all to everybody, and a function to add nodes."""

    def run(main, min_nodes=1, of=model):
        async def inside():
            coordinator = await coordinator_class.start(
                tmp_path / "c", of, authority, min_nodes=min_nodes, place=everywhere
            )
            async with AsyncExitStack() as stack:

                async def add(name):
                    return await stack.enter_async_context(node_here(tmp_path / name, coordinator.token(), name))

                await main(coordinator, add)
            await coordinator.stop()

        asyncio.run(inside())

    return run


def all_ready(coordinator, count):
    return coordinator.until(lambda s: s.active is not None and len(s.active_owners) == count and s.ready)


def test_each_expert_leaves_the_coordinator_once(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BATCH_EXPERTS", 2)  # several batches, so that the nodes take turns

    async def main(coordinator, add):
        for name in ("a", "b", "c"):
            await add(name)
        await all_ready(coordinator, 3)
        assert asked(coordinator) == Counter(dict.fromkeys(coordinator.model.blobs, 1))
        assert coordinator.slices.bytes_sent == coordinator.model.manifest.total_bytes
        assert all(right(coordinator, tmp_path / name) for name in ("a", "b", "c"))

    scene(main, min_nodes=3)


class Counted:
    """A FetchSlice that nobody answers before `together` are open at once, and those that are open now."""

    now: ClassVar[set["Counted"]] = set()
    most: ClassVar[int] = 0
    together: ClassVar[int] = 0
    reached: ClassVar[asyncio.Event]

    @classmethod
    def expect(cls, together):
        cls.most, cls.together, cls.reached = 0, together, asyncio.Event()

    def __init__(self, call):
        self._call = call
        self.now.add(self)
        Counted.most = max(self.most, len(self.now))
        if len(self.now) >= self.together:
            self.reached.set()

    async def read(self):
        await self.reached.wait()
        return await self._call.read()

    def cancel(self):
        self.now.discard(self)
        self._call.cancel()


def test_three_streams_come_at_once_from_the_coordinator_and_from_a_node(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BATCH_EXPERTS", 2)  # six batches
    fetch_slice = SourceChannels.fetch_slice
    monkeypatch.setattr(
        SourceChannels, "fetch_slice", lambda self, peer, request: Counted(fetch_slice(self, peer, request))
    )

    async def main(coordinator, add):
        for count, name in enumerate(("a", "b"), 1):
            Counted.expect(together=3)
            await add(name)
            await all_ready(coordinator, count)
            assert Counted.most == 3 and not Counted.now
        assert len(asked(coordinator)) == 12  # by the first; the second had all from it
        assert right(coordinator, tmp_path / "a") and right(coordinator, tmp_path / "b")

    scene(main)


def test_an_expert_that_is_on_its_way_is_waited_for(scene, tmp_path, monkeypatch, eventually):
    go_on = asyncio.Event()
    located = []

    async def main(coordinator, add):
        stream = coordinator.slices.stream
        locate = coordinator.server.sources.locate

        async def hold(request):
            await go_on.wait()
            async for chunk in stream(request):
                yield chunk

        def see(asker, experts, avoid):
            found = locate(asker, experts, avoid)
            located.append(found)
            return found

        coordinator.slices.stream = hold
        coordinator.server.sources.locate = see
        await add("a")
        await add("b")
        await eventually(lambda: len(located) == 2)  # one has the coordinator, the other waits for it
        assert {None} in [set(found) for found in located]
        assert any(None not in found for found in located)
        go_on.set()
        await all_ready(coordinator, 2)
        assert set(asked(coordinator).values()) == {1}
        assert right(coordinator, tmp_path / "a") and right(coordinator, tmp_path / "b")

    scene(main, min_nodes=2)


def test_a_node_that_lies_is_named_and_done_without(scene, tmp_path):
    async def main(coordinator, add):
        await add("a")
        await all_ready(coordinator, 1)
        coordinator.slices.requests.clear()
        victim = next((tmp_path / "a").glob("cache/*/1-4.*.expert"))
        lie = bytearray(victim.read_bytes())
        lie[1000] ^= 4
        victim.write_bytes(lie)  # after it was checked
        await add("b")
        await all_ready(coordinator, 2)
        assert set(asked(coordinator)) == {(1, 4)}  # the rest came from a
        assert right(coordinator, tmp_path / "b")
        assert coordinator.server.sources.fault(A) == "gave b wrong bytes of expert 4 of layer 1"
        assert coordinator.server.sources.fault(B) == ""

    scene(main)


def test_a_node_that_cannot_be_reached_is_done_without(scene, tmp_path):
    async def main(coordinator, add):
        node = await add("a")
        await all_ready(coordinator, 1)
        coordinator.slices.requests.clear()
        await node._server.stop(None)  # its control stream goes on
        await add("b")
        await all_ready(coordinator, 2)
        assert len(asked(coordinator)) == 12
        assert right(coordinator, tmp_path / "b")

    scene(main)


def test_a_node_that_ends_in_the_middle_is_done_without(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 4096)
    sent = 0

    async def main(coordinator, add):
        node = await add("a")
        await all_ready(coordinator, 1)
        coordinator.slices.requests.clear()
        from moehive.expert_node import peers

        give = peers._file_chunks

        async def cut(path, want, may_compress):
            nonlocal sent
            async for chunk in give(path, want, may_compress):
                yield chunk
                sent += 1
                if sent == 7:  # in the middle of the second expert
                    raise OSError("the disk has failed")

        monkeypatch.setattr(peers, "_file_chunks", cut)
        await add("b")
        await all_ready(coordinator, 2)
        assert node.agent.attending
        first = coordinator.slices.requests[0].experts[0]
        assert first.offset > 0  # what a had given of it was kept
        assert right(coordinator, tmp_path / "b")

    scene(main)


def test_only_nodes_of_the_cluster_may_ask(scene, model):
    async def main(coordinator, add):
        node = await add("a")
        await all_ready(coordinator, 1)
        address = coordinator.membership.state.nodes[A].capacity.address
        request = pb.SliceRequest(fingerprint=model.manifest.fingerprint)
        request.experts.add(layer=0, expert=3)

        async def ask(identity, wanted=request):
            async with open_channel(address, identity, node_dns_name("a")) as channel:
                call = cluster_pb2_grpc.PeersStub(channel).FetchSlice(wanted, metadata=metadata(), timeout=20)
                return [chunk async for chunk in call]

        own = node._identity.current()
        (chunk,) = await ask(own)
        assert chunk.data == model.blobs[ExpertId(0, 3)].numpy().tobytes()
        with pytest.raises(grpc.aio.AioRpcError, match="Only nodes of this cluster"):
            await ask(coordinator.server.identity())
        for wrong, code in (
            (pb.SliceRequest(fingerprint="0" * 64, experts=request.experts), grpc.StatusCode.NOT_FOUND),
            (pb.SliceRequest(fingerprint="0", experts=request.experts), grpc.StatusCode.INVALID_ARGUMENT),
            (pb.SliceRequest(fingerprint=request.fingerprint), grpc.StatusCode.INVALID_ARGUMENT),
            (
                pb.SliceRequest(fingerprint=request.fingerprint, experts=[pb.ExpertWanted(layer=9, expert=1)]),
                grpc.StatusCode.NOT_FOUND,
            ),
            (
                pb.SliceRequest(fingerprint=request.fingerprint, experts=[pb.ExpertWanted(offset=1 << 40)]),
                grpc.StatusCode.INVALID_ARGUMENT,
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(own, wrong)
            assert caught.value.code() == code

    scene(main)


def test_what_shrinks_travels_compressed(scene, tmp_path, model, model_class, monkeypatch):
    monkeypatch.setattr(download, "is_loopback", lambda address: False)
    blobs = {expert: torch.zeros_like(blob) for expert, blob in model.blobs.items()}
    for expert, blob in blobs.items():
        blob[::7] = expert.layer + 2 * expert.expert
    blobs[ExpertId(0, 0)] = model.blobs[ExpertId(0, 0)]  # random bf16: some

    async def main(coordinator, add):
        await add("a")
        await all_ready(coordinator, 1)
        assert coordinator.slices.bytes_sent < 0.5 * model.manifest.total_bytes
        await add("b")
        await all_ready(coordinator, 2)
        assert set(asked(coordinator).values()) == {1}
        assert right(coordinator, tmp_path / "a") and right(coordinator, tmp_path / "b")

    scene(main, of=model_class(model.manifest, blobs))
