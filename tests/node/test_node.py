"""A node on the test's own loop against the real coordinator's cluster server, over mutual TLS on loopback."""

import asyncio
from pathlib import Path

import pytest
import torch

from moehive.coordinator.cluster import membership as membership_module
from moehive.coordinator.cluster.trust import Authority
from moehive.coordinator.types import NodeName
from moehive.expert_node import agent, uplink
from moehive.expert_node.node import start
from moehive.expert_node.settings import Settings
from moehive.expert_node.types import ConfigError
from moehive.proto import experts_pb2 as pb
from moehive.proto.join_token import parse
from moehive.proto.tensors import Reply, read_values

A = NodeName("a")


def cached(state: Path) -> list[Path]:
    return sorted(state.glob("cache/*/*.expert"))


def test_coordinator_restarts(tmp_path, coordinator_class, authority, model, node_here, make_request):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        async with node_here(tmp_path / "a", coordinator.token()):
            await coordinator.until_ready()
            ports = coordinator.server.join_port, coordinator.server.cluster_port
            await coordinator.stop()

            coordinator = await coordinator_class.start(tmp_path / "c", model, authority, ports=ports)
            await coordinator.until_ready()
            assert coordinator.slices.requests == []  # it held its slice all the time
            request, hidden, routing = make_request(64, [1, 2], epoch=coordinator.membership.state.epoch)
            reply = await coordinator.compute(request)
            torch.testing.assert_close(
                read_values(Reply(reply, reply.values), 1, 64, torch.float32),
                model.sums(0, hidden, routing),
                rtol=1e-4,
                atol=1e-5,
            )
        await coordinator.stop()

    asyncio.run(main())


def test_another_model_replaces_the_first(tmp_path, coordinator_class, authority, model, model_class, node_here):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        async with node_here(tmp_path / "a", coordinator.token()):
            await coordinator.until_ready()
            ports = coordinator.server.join_port, coordinator.server.cluster_port
            await coordinator.stop()

            other = model_class.random(model.manifest.layers[0].spec, layers=3, experts=4, seed=1)
            coordinator = await coordinator_class.start(tmp_path / "c", other, authority, ports=ports)
            await coordinator.until_ready()
            await coordinator.until(lambda state: state.nodes[A].figures.experts_held == 12)
            assert coordinator.membership.state.nodes[A].figures.bytes_held == other.manifest.total_bytes
            assert len(list((tmp_path / "a/cache").iterdir())) == 2  # the first model's cache is kept
        await coordinator.stop()

    asyncio.run(main())


def test_cut_slices_are_resumed(tmp_path, coordinator_class, authority, model_class, node_here, monkeypatch):
    from moehive.kernels.geometry import ExpertSpec
    from moehive.proto import chunks

    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 4096)
    spec = ExpertSpec(hidden_size=64, intermediate_size=48, activation="silu", format="f32")
    model = model_class.random(spec, layers=1, experts=3)
    assert spec.nbytes == 36864  # nine chunks

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        coordinator.slices.cut_after = 13  # in the second expert
        async with node_here(tmp_path / "a", coordinator.token()):
            await coordinator.until_ready()
            first, second = coordinator.slices.requests
            assert [(e.expert, e.offset) for e in first.experts] == [(0, 0), (1, 0), (2, 0)]
            assert [(e.expert, e.offset) for e in second.experts] == [(1, 4 * 4096), (2, 0)]
        await coordinator.stop()

    asyncio.run(main())


def test_hostile_slices_are_refused(tmp_path, coordinator_class, authority, model, node_here):
    lies = [
        lambda chunk: setattr(chunk, "data", chunk.data[:-1] + bytes([chunk.data[-1] ^ 1])),
        lambda chunk: setattr(chunk, "expert_digest", bytes(32)),
        lambda chunk: setattr(chunk, "total_bytes", 1 << 50),
        lambda chunk: setattr(chunk, "offset", 64),
        lambda chunk: setattr(chunk, "expert", chunk.expert + 1),
        lambda chunk: chunk.Clear(),
    ]

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        coordinator.slices.tamper = lies[0]
        async with node_here(tmp_path / "a", coordinator.token()):
            for lie in lies:
                coordinator.slices.tamper = lie
                seen = len(coordinator.slices.requests)
                await coordinator.until(lambda state: not (A in state.nodes and state.nodes[A].problem))
                await coordinator.until(lambda state: A in state.nodes and state.nodes[A].problem != "")
                assert len(coordinator.slices.requests) > seen
                assert cached(tmp_path / "a") == []
            coordinator.slices.tamper = None
            await coordinator.until_ready()
            assert len(cached(tmp_path / "a")) == 12
        await coordinator.stop()

    asyncio.run(main())


def test_other_nodes_may_not_ask(tmp_path, coordinator_class, authority, model, node_here, make_request):
    """Only the coordinator's certificate opens Experts: not another node's, not another cluster's, none."""
    import grpc
    import grpc.aio
    from grpc_channel import open_channel

    from moehive.coordinator.bench.certificates import node_identity
    from moehive.proto import experts_pb2_grpc
    from moehive.proto.channel import Identity, node_dns_name
    from moehive.proto.handshake import metadata

    other_node = node_identity(authority, "b")
    stranger = Authority.create(tmp_path / "other").issue_coordinator()
    stranger = Identity(stranger.key_pem, stranger.chain_pem, authority.ca_pem)

    async def ask(address, identity, headers):
        async with open_channel(address, identity, node_dns_name("a")) as channel:
            call = experts_pb2_grpc.ExpertsStub(channel).Compute(metadata=headers)
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details()
            return None

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        async with node_here(tmp_path / "a", coordinator.token()):
            await coordinator.until_ready()
            address = coordinator.membership.state.nodes[A].capacity.address
            code, details = await ask(address, other_node, metadata())
            assert code is grpc.StatusCode.PERMISSION_DENIED and "Only the coordinator" in details
            code, _ = await ask(address, stranger, metadata())
            assert code is grpc.StatusCode.UNAVAILABLE
            old = (("moehive-protocol", "0"), ("moehive-version", "0.0.1"))
            code, details = await ask(address, coordinator.server.identity(), old)
            assert code is grpc.StatusCode.FAILED_PRECONDITION and "0.0.1" in details
        await coordinator.stop()

    asyncio.run(main())


def test_refusals_name_the_reason(tmp_path, coordinator_class, authority, model, node_here, make_request):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority, min_nodes=2)
        async with node_here(tmp_path / "a", coordinator.token()):
            async with node_here(tmp_path / "b", coordinator.token(), "b"):
                await coordinator.until_ready()
                epoch = coordinator.membership.state.epoch
                of_b = [e for e, nodes in enumerate(coordinator.membership.state.active.owners[0]) if nodes == ("b",)]
                reply = await coordinator.compute(make_request(64, of_b, epoch=epoch)[0], "a")
                assert reply.refusal.reason == pb.Refusal.REASON_EXPERT_MISSING
                assert f"expert {of_b[0]}" in reply.refusal.sentence or f"expert {of_b[1]}" in reply.refusal.sentence
                reply = await coordinator.compute(make_request(64, of_b, epoch=0)[0], "b")
                assert reply.refusal.reason == pb.Refusal.REASON_STALE_EPOCH
                reply = await coordinator.compute(make_request(32, of_b, epoch=epoch)[0], "b")
                assert reply.refusal.reason == pb.Refusal.REASON_FAILED and "hidden size 32" in reply.refusal.sentence
        await coordinator.stop()

    asyncio.run(main())


def test_silence_is_not_forever(monkeypatch):
    """The node's heartbeat is shorter than what the coordinator calls silence."""
    assert 2 * agent.HEARTBEAT_SECONDS < membership_module.SILENCE_SECONDS


def test_port_in_use(tmp_path, coordinator_class, authority, model):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        taken = ("127.0.0.1", coordinator.server.cluster_port)
        settings = Settings(
            state=tmp_path / "a",
            token=parse(coordinator.token()),
            name="a",
            memory_bytes=1 << 20,
            threads=1,
            listen=taken,
        )
        with pytest.raises(ConfigError, match="port is in use"):
            await start(settings)
        await coordinator.stop()

    asyncio.run(main())


def test_another_version_is_said_once_and_tried_again(
    tmp_path, coordinator_class, authority, model, node_here, eventually, monkeypatch, caplog
):
    refused = 0

    def old():
        nonlocal refused
        refused += 1
        return (("moehive-protocol", "0"), ("moehive-version", "0.0.1"))

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        monkeypatch.setattr(agent, "REFUSED_SECONDS", 0.01)
        with monkeypatch.context() as patch:
            patch.setattr(uplink, "metadata", old)
            async with node_here(tmp_path / "a", coordinator.token()):
                await eventually(lambda: refused >= 4)
                patch.undo()
                await coordinator.until_ready()
        await coordinator.stop()

    asyncio.run(main())
    said = [r.getMessage() for r in caplog.records if "0.0.1" in r.getMessage() and r.name.endswith("agent")]
    assert len(said) == 1 and "install the same version on both" in said[0]


def test_a_strangers_coordinator_is_not_followed(
    tmp_path, coordinator_class, authority, model, node_here, eventually, caplog
):
    """At the address of the coordinator another cluster answers: the node waits for its own."""

    async def main():
        own = await coordinator_class.start(tmp_path / "c", model, authority)
        ports = own.server.join_port, own.server.cluster_port
        async with node_here(tmp_path / "a", own.token()) as node:
            await own.until_ready()
            await own.stop()
            await eventually(lambda: not node.agent.attending)
            stranger = await coordinator_class.start(
                tmp_path / "c2", model, Authority.create(tmp_path / "ca2"), ports=ports
            )
            await eventually(lambda: "its certificate is not coordinator.moehive's" in caplog.text)
            assert A not in stranger.membership.state.nodes
            await stranger.stop()
            own = await coordinator_class.start(tmp_path / "c", model, authority, ports=ports)
            await own.until_ready()
        await own.stop()

    asyncio.run(main())
