"""The channels that experts come through."""

import asyncio

import grpc
import grpc.aio
import pytest

from moehive.expert_node.identity import obtain
from moehive.expert_node.sources import SourceChannels
from moehive.expert_node.uplink import Uplink
from moehive.kernels.digest import digest_of
from moehive.kernels.geometry import ExpertId
from moehive.proto import cluster_pb2 as pb
from moehive.proto.chunks import read_chunk
from moehive.proto.join_token import parse


def test_a_coordinator_that_comes_back_is_asked_on_a_new_connection(tmp_path, coordinator_class, authority, model):
    wanted = [pb.ExpertWanted(layer=1, expert=2)]
    fingerprint = model.manifest.fingerprint
    blob = model.blobs[ExpertId(1, 2)].numpy()

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        ports = coordinator.server.join_port, coordinator.server.cluster_port
        identity = await obtain(tmp_path / "n", parse(coordinator.token()), "a", "host")
        uplink, sources = Uplink(identity), SourceChannels(identity.current, identity.cluster_address)

        async def ask():
            located = await uplink.locate(pb.LocateRequest(fingerprint=fingerprint, experts=wanted))
            assert list(located.sources) == [0]
            hashes = await uplink.hash_experts(pb.HashRequest(fingerprint=fingerprint, experts=wanted))
            assert list(hashes.digests) == [digest_of(blob)]
            call = sources.fetch_slice(None, pb.SliceRequest(fingerprint=fingerprint, experts=wanted))
            assert read_chunk(await call.read()).data == blob.tobytes()
            assert await call.read() is grpc.aio.EOF

        await ask()
        await coordinator.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        again = await coordinator_class.start(tmp_path / "c", model, authority, ports=ports)
        await ask()
        await sources.close()
        await uplink.close()
        await again.stop()

    asyncio.run(main())
