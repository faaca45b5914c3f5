"""Experts.Compute: right answers for every kind of request, a status for every kind of nonsense."""

import asyncio
import os
import threading
from contextlib import asynccontextmanager
from time import perf_counter_ns

import grpc
import grpc.aio
import pytest
import torch
from grpc_channel import open_channel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moehive.coordinator.bench.certificates import node_identity
from moehive.expert_node import executor as executor_module
from moehive.expert_node.chain import Onward
from moehive.expert_node.executor import Executor
from moehive.expert_node.service import ExpertsService
from moehive.expert_node.store import ExpertStore
from moehive.kernels.ops import ExpertOps, Reduction, load_expert
from moehive.proto import experts_pb2 as pb
from moehive.proto import experts_pb2_grpc
from moehive.proto.channel import MAX_MESSAGE_BYTES, node_dns_name
from moehive.proto.handshake import metadata
from moehive.proto.interceptor import CallGuard
from moehive.proto.tensors import Reply, WireError, read_values
from moehive.proto.wire.messages import COPIED_BYTES
from moehive.proto.wire.server import Server
from moehive.proto.wire.tls import server_context

EXAMPLES = int(os.environ.get("MOEHIVE_FUZZ_EXAMPLES", "200"))
MIB = 1 << 20


@pytest.fixture
def serving(authority, model):
    """A context: a service with all of the model's experts, and a channel to it with the coordinator's identity."""
    identity = node_identity(authority, "a")

    @asynccontextmanager
    async def serve():
        store = ExpertStore(model.manifest.total_bytes)
        store.use(model.manifest, 1)
        for expert, blob in model.blobs.items():
            store.add(expert, load_expert(model.manifest.layers[expert.layer].spec, blob))
        service = ExpertsService(Executor(store, ExpertOps(1)), Onward(lambda: identity))
        guard = CallGuard({WireError: grpc.StatusCode.INVALID_ARGUMENT})
        server = Server(guard)
        experts_pb2_grpc.add_ExpertsServicer_to_server(service, server)
        port = await server.listen("127.0.0.1", 0, server_context(lambda: identity))
        async with open_channel(f"127.0.0.1:{port}", authority.issue_coordinator(), node_dns_name("a")) as channel:
            yield service, channel
        await server.stop(None)
        await service.close()

    return serve


@pytest.mark.parametrize("large_work", [0, executor_module.LARGE_WORK], ids=["worker", "loop"])
def test_answers_are_the_reference(serving, model, make_request, monkeypatch, large_work):
    monkeypatch.setattr(executor_module, "LARGE_WORK", large_work)

    async def main():
        async with serving() as (service, channel):
            call = experts_pb2_grpc.ExpertsStub(channel).Compute(metadata=metadata())
            asked = {}
            kinds = [
                (dtype, reduction, tokens)
                for dtype in (torch.float32, torch.bfloat16)
                for reduction in (pb.REDUCTION_PARTIAL_SUM, pb.REDUCTION_PER_EXPERT)
                for tokens in (1, 5, 40)
            ]
            for number, (dtype, reduction, tokens) in enumerate(kinds):
                request, hidden, routing = make_request(
                    64, [0, 2, 5], tokens, layer=1, dtype=dtype, reduction=reduction, seed=number
                )
                request.id = number + 100
                asked[request.id] = (dtype, reduction, hidden, routing)
                await call.write(request)
            await call.done_writing()
            async for reply in call:  # in any order
                dtype, reduction, hidden, routing = asked.pop(reply.id)
                per_expert = reduction == pb.REDUCTION_PER_EXPERT
                wanted = (model.pairs if per_expert else model.sums)(1, hidden, routing)
                values = read_values(Reply(reply, reply.values), len(wanted), 64, dtype)
                rounding = 2**-8 if dtype is torch.bfloat16 else 1e-4
                torch.testing.assert_close(values.float(), wanted, rtol=rounding, atol=rounding / 10)
                assert reply.compute_ns > 0
            assert not asked
            assert service._executor.totals.calls == len(kinds)

    asyncio.run(main())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_a_large_request_lie_where_its_states_did(serving, make_request, monkeypatch, dtype):
    request, hidden, routing = make_request(64, [0, 2, 5], tokens=600, dtype=dtype)
    assert len(request.hidden_states) > COPIED_BYTES

    async def main():
        async with serving() as (service, channel):
            executor = service._executor
            wanted = executor.compute(0, hidden, routing, Reduction.PARTIAL_SUM)[0]
            in_place = []

            def compute(layer, hidden, routing, reduction, likely, own):
                in_place.append(own)
                return Executor.compute(executor, layer, hidden, routing, reduction, likely, own)

            monkeypatch.setattr(executor, "compute", compute)
            call = experts_pb2_grpc.ExpertsStub(channel).Compute(metadata=metadata())
            await call.write(request)
            reply = await call.read()
            values = read_values(Reply(reply, reply.values), len(wanted), 64, dtype)
            assert torch.equal(values, wanted) and in_place == [True]

    asyncio.run(main())


@pytest.mark.parametrize("way", ["native", "loop", "worker"])
def test_a_reply_says_where_its_time_went(serving, make_request, monkeypatch, way):
    if way == "worker":
        monkeypatch.setattr(executor_module, "LARGE_WORK", 0)
    request = make_request(64, [0, 2, 5], tokens=40 if way == "worker" else 1)[0]
    request.epoch = 1
    if way != "native":
        request.likely.append(bytes(4))  # which only Python reads

    async def main():
        async with serving() as (service, channel):
            call = experts_pb2_grpc.ExpertsStub(channel).Compute(metadata=metadata())
            native = []
            monkeypatch.setattr(service, "took", native.append)
            before = 0
            for number in range(3):
                sent = perf_counter_ns()
                await call.write(request)
                reply = await call.read()
                came = perf_counter_ns()
                assert sent <= reply.began_ns - reply.waited_ns - reply.reading_ns
                assert reply.began_ns + reply.compute_ns <= came
                assert reply.reading_ns > 0 and bool(reply.wrote_ns) == (number > 0)
                assert before + reply.wrote_ns <= reply.began_ns
                before = reply.began_ns + reply.compute_ns
            assert (sum(native) > 0) == (way == "native")  # the first may come before anybody takes it
            if way == "worker":  # which takes one after the other
                for _ in range(2):
                    await call.write(request)
                first, second = await call.read(), await call.read()
                assert first.began_ns + first.compute_ns <= second.began_ns
                assert second.waited_ns > 0

    asyncio.run(main())


def test_same_request_same_bits(serving, make_request):
    async def main():
        async with serving() as (_, channel):
            call = experts_pb2_grpc.ExpertsStub(channel).Compute(metadata=metadata())
            answers = set()
            for _ in range(3):
                await call.write(make_request(64, [4, 1, 0], tokens=9, dtype=torch.bfloat16)[0])
                answers.add((await call.read()).values)
            assert len(answers) == 1

    asyncio.run(main())


def test_a_small_request_does_not_wait_on_the_loop_behind_a_large_one(serving, make_request, monkeypatch):
    """While the worker computes, the loop's thread stays free, also when a small request comes in."""
    monkeypatch.setattr(executor_module, "LARGE_WORK", 100_000)

    async def main():
        async with serving() as (service, channel):
            loop = asyncio.get_running_loop()
            started, go_on = asyncio.Event(), threading.Event()
            compute = service._executor.compute

            def slow(layer, hidden, *rest):
                if len(hidden) == 40:
                    loop.call_soon_threadsafe(started.set)
                    assert go_on.wait(30)
                return compute(layer, hidden, *rest)

            monkeypatch.setattr(service._executor, "compute", slow)
            call = experts_pb2_grpc.ExpertsStub(channel).Compute(metadata=metadata())
            await call.write(make_request(64, [0, 1], tokens=40)[0])
            await asyncio.wait_for(started.wait(), 30)
            small = make_request(64, [0, 1])[0]
            small.id = 8
            await call.write(small)
            go_on.set()
            assert {(await call.read()).id, (await call.read()).id} == {7, 8}

    asyncio.run(main())


def test_draining_refuses(serving, make_request):
    async def main():
        async with serving() as (service, channel):
            service.draining = True
            call = experts_pb2_grpc.ExpertsStub(channel).Compute(metadata=metadata())
            await call.write(make_request(64, [0, 1])[0])
            assert (await call.read()).refusal.reason == pb.Refusal.REASON_DRAINING

    asyncio.run(main())


def test_failing_arithmetic_is_a_refusal(serving, make_request, monkeypatch):
    async def main():
        async with serving() as (service, channel):

            def fail(*_):
                raise RuntimeError("no memory for the intermediate")

            monkeypatch.setattr(service._executor, "compute", fail)
            call = experts_pb2_grpc.ExpertsStub(channel).Compute(metadata=metadata())
            await call.write(make_request(64, [0, 1], tokens=40)[0])
            refusal = (await call.read()).refusal
            assert refusal.reason == pb.Refusal.REASON_FAILED and "no memory" in refusal.sentence

    asyncio.run(main())


BIG = st.integers(0, 2**32 - 1)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 2**64 - 1),
        "epoch": st.integers(0, 2**64 - 1),
        "layer": st.one_of(st.integers(0, 3), BIG),
        "tokens": st.one_of(st.integers(0, 3), BIG),
        "hidden_size": st.one_of(st.just(64), BIG),
        "dtype": st.integers(0, 4),
        "reduction": st.integers(0, 4),
        "hidden_states": st.binary(max_size=600),
        "offsets": st.binary(max_size=40),
        "experts": st.binary(max_size=40),
        "weights": st.binary(max_size=40),
    },
)


def test_nonsense_neither_kills_nor_grows(tmp_path, coordinator_class, authority, model, start_node, make_request):
    """Random, cut and contradictory messages against a real node process."""
    valid, hidden, routing = make_request(64, [0, 1, 2], tokens=3)
    whole = valid.SerializeToString()

    def changed(fields):
        request = pb.ComputeRequest.FromString(whole)
        for name, value in fields.items():
            setattr(request, name, value)
        return request.SerializeToString()

    messages = st.one_of(
        st.binary(max_size=300),
        st.integers(0, len(whole)).map(lambda cut: whole[:cut]),
        st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)).map(
            lambda at: whole[: at[0]] + bytes([whole[at[0]] ^ at[1]]) + whole[at[0] + 1 :]
        ),
        FIELDS.map(changed),
    )

    async def send(channel, batch):
        """The stream's status; every message is answered or ends the stream."""
        method = channel.stream_stream("/moehive.experts.v1.Experts/Compute")
        call = method(metadata=metadata())
        for message in batch:  # one at a time: gRPC's client calls its own write to an ended stream INTERNAL
            try:
                await call.write(message)
                reply = await call.read()
            except grpc.aio.AioRpcError:
                return await call.code()
            pb.ComputeReply.FromString(reply)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        return await call.code()

    with asyncio.Runner() as runner:
        coordinator = runner.run(coordinator_class.start(tmp_path / "c", model, authority))
        node = start_node("--token", coordinator.token(), "--name", "a")
        runner.run(coordinator.until_ready())
        state = coordinator.membership.state
        (present,) = state.nodes.values()

        async def connect():
            return open_channel(present.capacity.address, coordinator.server.identity(), node_dns_name("a"))

        async def oversized(address):
            """One message beyond the limit, from a client that has none."""
            identity = coordinator.server.identity()
            credentials = grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.chain_pem)
            unlimited = [("grpc.max_send_message_length", -1), ("grpc.ssl_target_name_override", node_dns_name("a"))]
            async with grpc.aio.secure_channel(address, credentials, options=unlimited) as channel:
                return await send(channel, [bytes(MAX_MESSAGE_BYTES + 1)])

        channel = runner.run(connect())

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(st.lists(messages, min_size=1, max_size=3))
        def attack(batch):
            code = runner.run(send(channel, batch))
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), code

        for _ in range(20):
            runner.run(send(channel, [whole, b"\xff"]))
        before = node.resident()
        attack()
        for _ in range(3):
            assert runner.run(oversized(present.capacity.address)) in (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                grpc.StatusCode.INTERNAL,  # what gRPC's client says when the stream ends while it writes
            )
        assert node.resident() < before + 32 * MIB

        assert node.alive and "Traceback" not in node.text
        valid.epoch = state.epoch
        reply = runner.run(coordinator.compute(valid))
        wanted = model.sums(0, hidden, routing)
        torch.testing.assert_close(
            read_values(Reply(reply, reply.values), 3, 64, torch.float32), wanted, rtol=1e-4, atol=1e-5
        )
        runner.run(channel.close())
        runner.run(coordinator.stop())
