"""A request that goes from node to node: the sum of all, who failed by name, and nothing for strangers."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
import torch

from moehive.coordinator.bench.certificates import node_identity
from moehive.coordinator.cluster.trust import Authority
from moehive.expert_node.chain import Onward
from moehive.expert_node.executor import Executor
from moehive.expert_node.service import ExpertsService
from moehive.expert_node.store import ExpertStore
from moehive.kernels.ops import ExpertOps, load_expert
from moehive.proto import experts_pb2 as pb
from moehive.proto import experts_pb2_grpc
from moehive.proto.chain import MAX_CHAIN, MAX_CHAIN_BYTES, add_to_chain
from moehive.proto.channel import Identity, node_dns_name
from moehive.proto.fields import find_field
from moehive.proto.handshake import metadata
from moehive.proto.interceptor import CallGuard
from moehive.proto.tensors import Reply, Routing, WireError, read_values
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.messages import COPIED_BYTES
from moehive.proto.wire.methods import COMPUTE, PASS_ON
from moehive.proto.wire.server import Server
from moehive.proto.wire.tls import server_context

NAMES = ("a", "b", "c")


METHODS = {"Compute": COMPUTE, "PassOn": PASS_ON}


class Cluster:
    """Services a, b and c, each with all of the model's experts, behind their own sockets."""

    def __init__(self):
        self.addresses, self.services, self.servers, self.identities = {}, {}, {}, {}

    async def ask(self, request, identity, method="Compute", name="a"):
        """The reply to one request on a new stream. Raises AioRpcError."""
        channel = Channel(self.addresses[name], identity, node_dns_name(name))
        try:
            stream = await channel.open(METHODS[method], metadata())
            stream.send((request.SerializeToString(),))
            reply = await asyncio.wait_for(stream.read(), 30)
            assert reply is not None
            return pb.ComputeReply.FromString(bytes(reply))
        finally:
            await channel.close()


@pytest.fixture
def scene(authority, model):
    """Runs a coroutine function with the cluster and the coordinator's identity."""

    @asynccontextmanager
    async def serve():
        cluster = Cluster()
        onwards = []
        for name in NAMES:
            identity = cluster.identities[name] = node_identity(authority, name)
            store = ExpertStore(model.manifest.total_bytes)
            store.use(model.manifest, 1)
            for expert, blob in model.blobs.items():
                store.add(expert, load_expert(model.manifest.layers[expert.layer].spec, blob))
            onwards.append(Onward(lambda identity=identity: identity))
            service = cluster.services[name] = ExpertsService(Executor(store, ExpertOps(1)), onwards[-1])
            guard = CallGuard({WireError: grpc.StatusCode.INVALID_ARGUMENT})
            server = cluster.servers[name] = Server(guard)
            experts_pb2_grpc.add_ExpertsServicer_to_server(service, server)
            port = await server.listen("127.0.0.1", 0, server_context(lambda identity=identity: identity))
            cluster.addresses[name] = f"127.0.0.1:{port}"
        try:
            yield cluster
        finally:
            for onward in onwards:
                await onward.close()
            for name in NAMES:
                await cluster.servers[name].stop(None)
                await cluster.services[name].close()

    def run(main):
        async def inside():
            async with serve() as cluster:
                await main(cluster, authority.issue_coordinator())

        asyncio.run(asyncio.wait_for(inside(), 60))

    return run


@pytest.fixture
def chained(make_request):
    """A request over nodes a, b and c, with the hidden states and each node's routing."""

    def make(cluster, tokens=5, dtype=torch.float32, names=("b", "c")):
        request, hidden, routing = make_request(64, [0, 1], tokens, dtype=dtype)
        routings = [routing]
        for number, name in enumerate(names, 1):
            more = make_request(64, [2 * number % 6, 2 * number % 6 + 1], tokens, seed=number)[2]
            routings.append(more)
            add_to_chain(request, name, cluster.addresses.get(name, "127.0.0.1:1"), more)
        return request, hidden, routings

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_all(scene, chained, model, dtype):
    async def main(cluster, coordinator):
        request, hidden, routings = chained(cluster, 7, dtype)
        for _ in range(2):  # the second on the streams that are open
            reply = await cluster.ask(request, coordinator)
            assert reply.id == request.id and len(reply.chain_ns) == 2 and all(reply.chain_ns) and reply.compute_ns
            wanted = sum(model.sums(0, hidden, routing) for routing in routings)
            rounding = 2**-6 if dtype is torch.bfloat16 else 1e-4
            got = read_values(Reply(reply, reply.values), 7, 64, dtype).float()
            torch.testing.assert_close(got, wanted, rtol=rounding, atol=rounding)
        assert [cluster.services[name]._executor.totals.calls for name in NAMES] == [2, 2, 2]

    scene(main)


def test_states_stay_while_they_are_passed_on(scene, chained, model):
    """Of a large message, in whose memory the last node's sums go."""

    async def main(cluster, coordinator):
        request, hidden, routings = chained(cluster, 1200)
        assert len(request.hidden_states) > COPIED_BYTES
        for step in (
            0,
            1,
            1 << 7,
            1 << 14,
        ):  # a field in front, of no byte to four: then states are read where they lie
            request.step = step
            field = find_field(request.SerializeToString(), pb.ComputeRequest.HIDDEN_STATES_FIELD_NUMBER)
            if field.content % hidden.itemsize == 0:
                break
        else:
            raise AssertionError("No step aligns them.")
        reply = await cluster.ask(request, coordinator)
        wanted = sum(model.sums(0, hidden, routing) for routing in routings)
        got = read_values(Reply(reply, reply.values), 1200, 64, torch.float32)
        assert (got - wanted).norm() < 2**-7 * wanted.norm()

    scene(main)


def test_who_fails_is_named(scene, chained, monkeypatch):
    async def main(cluster, coordinator):
        request = chained(cluster)[0]
        assert not (await cluster.ask(request, coordinator)).HasField("refusal")

        cluster.services["c"].draining = True
        refusal = (await cluster.ask(request, coordinator)).refusal
        assert (refusal.node_name, refusal.reason) == ("c", pb.Refusal.REASON_FAILED)
        cluster.services["c"].draining = False

        def short(*arguments):
            rows, elapsed = type(executor).compute(executor, *arguments)
            return rows[:-1], elapsed

        executor = cluster.services["c"]._executor
        with monkeypatch.context() as patch:
            patch.setattr(cluster.services["c"]._plain, "ready", lambda: False)
            patch.setattr(executor, "compute", short)
            refusal = (await cluster.ask(request, coordinator)).refusal
            assert refusal.node_name == "c" and "4 rows where 5" in refusal.sentence

        await cluster.servers["c"].stop(None)
        refusal = (await cluster.ask(request, coordinator)).refusal
        assert refusal.node_name == "c" and "Node c" in refusal.sentence

        cluster.services["a"].draining = True
        refusal = (await cluster.ask(request, coordinator)).refusal
        assert (refusal.node_name, refusal.reason) == ("", pb.Refusal.REASON_DRAINING)

    scene(main)


def test_a_node_asks_only_whom_it_was_told_to(scene, chained):
    """b's address is given for c: its certificate says another name."""

    async def main(cluster, coordinator):
        request = chained(cluster)[0]
        request.chain[1].address = cluster.addresses["a"]
        assert (await cluster.ask(request, coordinator)).refusal.node_name == "c"
        assert cluster.services["a"]._executor.totals.calls == 1

    scene(main)


def test_only_nodes_of_the_cluster_may_pass_on(scene, chained, authority, tmp_path):
    async def main(cluster, coordinator):
        request = chained(cluster)[0]
        assert not (await cluster.ask(request, cluster.identities["c"], "PassOn")).HasField("refusal")
        elsewhere = node_identity(Authority.create(tmp_path / "elsewhere"), "b")
        stranger = Identity(elsewhere.key_pem, elsewhere.chain_pem, authority.ca_pem)
        for identity, method, wanted in (
            (coordinator, "PassOn", grpc.StatusCode.PERMISSION_DENIED),
            (cluster.identities["c"], "Compute", grpc.StatusCode.PERMISSION_DENIED),
            (stranger, "PassOn", grpc.StatusCode.UNAVAILABLE),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.ask(request, identity, method)
            assert caught.value.code() is wanted
        assert cluster.services["a"]._executor.totals.calls == 1

    scene(main)


def _twice(request):
    request.chain.append(request.chain[0])


def _too_long(request):
    for number in range(MAX_CHAIN):
        node = request.chain.add()
        node.CopyFrom(request.chain[0])
        node.node_name = f"more-{number}"


def _exact(request):
    request.reduction = pb.REDUCTION_PER_EXPERT


def _huge(request):
    tokens = MAX_CHAIN_BYTES // 256 + 1
    request.tokens, request.hidden_states = tokens, bytes(256 * tokens)
    for message in (request, *request.chain):
        message.offsets, message.experts, message.weights = bytes(4 * (tokens + 1)), b"", b""


def _other_tokens(request):
    request.chain[0].offsets = request.chain[0].offsets[:-4]


def _many_experts(request):
    request.chain[1].experts *= 2


def _no_number(request):
    request.chain[1].weights = b"\xff" * len(request.chain[1].weights)


def _no_name(request):
    request.chain[0].node_name = "../b"


def _no_address(request):
    request.chain[0].address = "b" * 400


@pytest.mark.parametrize("method", ["Compute", "PassOn"])
@pytest.mark.parametrize(
    "spoil",
    [_twice, _too_long, _exact, _huge, _other_tokens, _many_experts, _no_number, _no_name, _no_address],
)
def test_what_is_out_of_bounds_is_refused_and_not_passed_on(scene, chained, spoil, method):
    async def main(cluster, coordinator):
        request = chained(cluster)[0]
        spoil(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.ask(request, coordinator if method == "Compute" else cluster.identities["b"], method)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not any(service._executor.totals.calls for service in cluster.services.values())

    scene(main)


def test_a_token_without_experts_on_a_node_adds_nothing(scene, chained, model):
    async def main(cluster, coordinator):
        request, hidden, routings = chained(cluster, tokens=3)
        nothing = Routing(routings[1].offsets * 0, routings[1].experts[:0], routings[1].weights[:0])
        del request.chain[:]
        for name, routing in (("b", nothing), ("c", routings[2])):
            add_to_chain(request, name, cluster.addresses[name], routing)
        wanted = model.sums(0, hidden, routings[0]) + model.sums(0, hidden, routings[2])
        reply = await cluster.ask(request, coordinator)
        got = read_values(Reply(reply, reply.values), 3, 64, torch.float32)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    scene(main)
