"""A node that is given more than its memory holds, by the real coordinator, over the wire."""

import asyncio
from dataclasses import replace

import numpy as np
import torch

from moehive.coordinator.placement.place import place
from moehive.coordinator.types import NodeName, Pins
from moehive.expert_node.node import start
from moehive.expert_node.settings import Settings
from moehive.kernels.geometry import ExpertSpec
from moehive.proto.join_token import parse
from moehive.proto.tensors import Reply, read_values
from moehive.proto.tiers import read_on_disk, write_likely

A = NodeName("a")


def test_more_experts_than_memory(tmp_path, coordinator_class, authority, model_class, make_request):
    spec = ExpertSpec(hidden_size=128, intermediate_size=96, activation="silu", format="f32")
    model = model_class.random(spec, layers=3, experts=6)
    memory = 1 << 20
    assert model.manifest.total_bytes > 2 * memory

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        node = await start(
            Settings(state=tmp_path / "a", token=parse(coordinator.token()), name="a", memory_bytes=memory, threads=1)
        )
        serving = asyncio.create_task(node.serve(asyncio.create_task(asyncio.Event().wait())))
        await coordinator.until_ready()
        seen = np.zeros(6, dtype=np.bool_)
        for layer in (0, 1, 2, 0, 1, 2):
            epoch = coordinator.membership.state.epoch
            request, hidden, routing = make_request(128, list(range(6)), tokens=3, layer=layer, epoch=epoch)
            write_likely(request, [[0, 1, 9000], [2]])
            reply = await coordinator.compute(request)
            got = read_values(Reply(reply, reply.values), 3, 128, torch.float32)
            torch.testing.assert_close(got, model.sums(layer, hidden, routing), rtol=1e-4, atol=1e-5)
            on_disk = read_on_disk(reply, 6)
            assert on_disk is not None
            seen |= on_disk
        assert seen.any()
        await coordinator.until(lambda state: state.nodes[A].figures.tiers is not None)
        tiers = coordinator.membership.state.nodes[A].figures.tiers
        assert tiers.ram_bytes <= memory < tiers.disk_bytes == model.manifest.total_bytes
        assert tiers.disk_read_bytes > 0
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await node.close()
        await coordinator.stop()

    asyncio.run(main())


def test_what_the_plan_pins_stays_in_memory(tmp_path, coordinator_class, authority, model_class, make_request):
    spec = ExpertSpec(hidden_size=128, intermediate_size=96, activation="silu", format="f32")
    model = model_class.random(spec, layers=3, experts=6)
    pins = Pins(in_ram=((1, 4), (), ()), in_vram=((), (), ()))

    def pinned(capacities, layers, epoch, previous):
        return replace(place(capacities, {}, layers, None, epoch, previous), pins={A: pins})

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority, place=pinned)
        node = await start(
            Settings(
                state=tmp_path / "a", token=parse(coordinator.token()), name="a", memory_bytes=1 << 20, threads=1
            )
        )
        serving = asyncio.create_task(node.serve(asyncio.create_task(asyncio.Event().wait())))
        await coordinator.until_ready()
        epoch = coordinator.membership.state.epoch
        for step in range(8):  # of either layer more experts than there is room for
            request, hidden, routing = make_request(128, list(range(6)), tokens=3, layer=step % 3, epoch=epoch)
            reply = await coordinator.compute(request)
            got = read_values(Reply(reply, reply.values), 3, 128, torch.float32)
            torch.testing.assert_close(got, model.sums(step % 3, hidden, routing), rtol=1e-4, atol=1e-5)
        request, _, _ = make_request(128, [1, 4], tokens=1, layer=0, epoch=epoch)
        on_disk = read_on_disk(await coordinator.compute(request), 6)
        assert not on_disk[[1, 4]].any() and on_disk.any()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await node.close()
        await coordinator.stop()

    asyncio.run(main())
