"""One layer over made-up nodes: the sum is right, and with PER_EXPERT it has the same bits for any placement."""

import asyncio
import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

from moehive.coordinator.dispatch.dispatcher import Dispatcher
from moehive.coordinator.dispatch.link import MAX_IN_FLIGHT, Link, Peer
from moehive.coordinator.dispatch.local import LocalExperts
from moehive.coordinator.dispatch.routes import Routes
from moehive.coordinator.dispatch.speed import LARGE_BYTES, LinkSpeed
from moehive.coordinator.dispatch.speeds import UNHEARD
from moehive.coordinator.types import LOCAL, NodeName, NodeUnavailable, NotReady, Plan
from moehive.kernels.blob import build_blob, tensor_views
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.ops import ExpertOps, Reduction, load_expert
from moehive.kernels.reference import expert_forward
from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import Reply, parse_reply, parse_request, read_request, reply_pieces
from moehive.proto.wire.windows import Times

EXPERTS, TOP_K, HIDDEN = 7, 3, 32
SPEC = ExpertSpec(hidden_size=HIDDEN, intermediate_size=24, activation="silu", format="f32")
MANIFEST = Manifest("made-up", "0" * 64, (LayerGeometry(EXPERTS, TOP_K, SPEC),) * 2)
REDUCTIONS = {pb.REDUCTION_PARTIAL_SUM: Reduction.PARTIAL_SUM, pb.REDUCTION_PER_EXPERT: Reduction.PER_EXPERT}


def blob(expert: ExpertId) -> torch.Tensor:
    generator = torch.Generator().manual_seed(expert.layer * 100 + expert.expert)
    return build_blob(SPEC, {t.name: torch.randn(t.shape, generator=generator) * 0.2 for t in SPEC.tensors})


class FakeLink:
    """A node in memory: the real messages, the real kernels, no socket. Of a `full` link no layer is a flight."""

    full = False
    waits = False

    def __init__(self, node: str, change: Callable[[pb.ComputeReply], None] = lambda reply: None) -> None:
        self.node = NodeName(node)
        self.change = change
        self.speed = LinkSpeed(loopback=False)
        self.peer = Peer(next_id=1, others=MAX_IN_FLIGHT if self.full else 0)
        self.peer_at = ctypes.addressof(self.peer)
        self.flights: Any = None
        self._ops = ExpertOps(1)

    def send(
        self, pieces: tuple[bytes, ...], nbytes: int, chained: bool = False, later: float = 0.0
    ) -> "asyncio.Future[Reply]":
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        future.set_result(parse_reply(self._answer(b"".join(pieces))))
        return future

    def send_flight(self, where: int, size: int, taken: int) -> None:
        asyncio.get_running_loop().call_soon(self._deliver, self._answer(ctypes.string_at(where, size)))

    def _deliver(self, reply: bytes) -> None:
        assert self.flights.take(self, reply, Times())

    def _answer(self, data: bytes) -> bytes:
        request = parse_request(data)
        message = request.head
        hidden, routing = read_request(request)
        held = {e: load_expert(SPEC, blob(ExpertId(message.layer, e))) for e in set(routing.experts.tolist())}
        reduction = REDUCTIONS[message.reduction]
        rows = self._ops.moe_layer(SPEC, held, hidden, routing.offsets, routing.experts, routing.weights, reduction)
        pieces = reply_pieces(pb.ComputeReply(id=message.id, compute_ns=5), rows, message.dtype)
        reply = pb.ComputeReply.FromString(b"".join(pieces))
        self.change(reply)
        return reply.SerializeToString()


@pytest.fixture(autouse=True, params=[False, True], ids=["flights", "full links"])
def full(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLink, "full", request.param)


def plan(owners: list[str], epoch: int = 1) -> Plan:
    layer = tuple((NodeName(owner),) for owner in owners)
    return Plan(epoch, (layer, layer))


def cluster(owners: list[str], reduction: Reduction) -> Dispatcher:
    local = LocalExperts(MANIFEST, 1)
    local.hold([ExpertId(layer, e) for layer in range(2) for e, o in enumerate(owners) if o == LOCAL], blob)
    dispatcher = Dispatcher(MANIFEST, local, reduction)
    for name in sorted(set(owners) - {LOCAL}):
        dispatcher.connect(cast(Link, FakeLink(name)))
    dispatcher.follow(plan(owners))
    return dispatcher


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype), ids, torch.rand(tokens, TOP_K)


async def _ask(dispatcher: Dispatcher, *arguments: Any) -> torch.Tensor:
    return await dispatcher.submit(*arguments)


def ask(dispatcher: Dispatcher, *arguments: Any) -> torch.Tensor:
    return asyncio.run(_ask(dispatcher, *arguments))


PLACEMENTS = [["a"] * 7, ["a", "b", "c", "a", "b", "c", "a"], [LOCAL, "b", LOCAL, "b", "c", "c", "c"], [LOCAL] * 7]


@pytest.mark.parametrize("reduction", list(Reduction))
@pytest.mark.parametrize("owners", PLACEMENTS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_sum_is_the_reference_for_any_placement(owners: list[str], reduction: Reduction, tokens: int) -> None:
    hidden, ids, weights = inputs(tokens)
    out = ask(cluster(owners, reduction), 1, hidden, ids, weights)
    wanted = torch.zeros_like(hidden)
    for t in range(tokens):
        for j in range(TOP_K):
            tensors = tensor_views(SPEC, blob(ExpertId(1, int(ids[t, j]))))
            wanted[t] += weights[t, j] * expert_forward(SPEC, tensors, hidden[t : t + 1])[0]
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_expert_has_the_same_bits_for_any_placement(dtype: torch.dtype) -> None:
    hidden, ids, weights = inputs(11, dtype)
    outs = [ask(cluster(o, Reduction.PER_EXPERT), 0, hidden, ids, weights) for o in PLACEMENTS]
    assert all(torch.equal(outs[0], out) for out in outs[1:]) and outs[0].dtype == dtype


def test_ids_beyond_the_experts_mean_none() -> None:
    hidden, _, weights = inputs(2)
    ids = torch.full((2, TOP_K), EXPERTS)
    out = ask(cluster(["a"] * 7, Reduction.PARTIAL_SUM), 0, hidden, ids, weights)
    assert torch.equal(out, torch.zeros_like(hidden))


def test_no_plan_is_not_ready_and_a_missing_node_is_named() -> None:
    hidden, ids, weights = inputs(3)
    bare = Dispatcher(MANIFEST, None, Reduction.PARTIAL_SUM, wait_seconds=0.05)
    with pytest.raises(NotReady):
        ask(bare, 0, hidden, ids, weights)
    bare.follow(plan(["gone"] * 7))
    with pytest.raises(NodeUnavailable, match="gone") as caught:
        ask(bare, 0, hidden, ids, weights)
    assert caught.value.node == "gone"


def test_a_replica_takes_over_when_the_first_owner_is_away() -> None:
    hidden, ids, weights = inputs(4)
    dispatcher = cluster(["a"] * 7, Reduction.PARTIAL_SUM)
    alone = ask(dispatcher, 0, hidden, ids, weights)
    both = tuple((NodeName("away"), NodeName("a")) for _ in range(EXPERTS))
    dispatcher.follow(Plan(2, (both, both)))
    assert torch.equal(ask(dispatcher, 0, hidden, ids, weights), alone)
    assert dispatcher.epoch == 2 and dispatcher.counters[NodeName("a")].expert_calls == 2 * 4 * TOP_K


def test_counters_tell_who_did_what() -> None:
    hidden, ids, weights = inputs(5)
    dispatcher = cluster([LOCAL, "b"] * 3 + ["b"], Reduction.PARTIAL_SUM)
    ask(dispatcher, 0, hidden, ids, weights)
    here = int(np.isin(ids.numpy(), [0, 2, 4]).sum())
    counted: Any = {name: c.expert_calls for name, c in dispatcher.counters.items()}
    assert counted == {LOCAL: here, "b": 5 * TOP_K - here}


def test_on_a_slow_link_rows_travel_in_8_bits_but_never_where_bits_count() -> None:
    hidden, ids, weights = inputs(9)
    outs = {}
    for reduction in Reduction:
        for slow in (False, True):
            dispatcher = cluster(["a", "b"] * 3 + ["a"], reduction)
            for name in ("a", "b"):
                link = cast(FakeLink, dispatcher.link(NodeName(name)))
                if slow:
                    link.speed.note(LARGE_BYTES, 2 * LARGE_BYTES, 1.0)
            outs[reduction, slow] = ask(dispatcher, 0, hidden, ids, weights)
    exact, rounded = outs[Reduction.PARTIAL_SUM, False], outs[Reduction.PARTIAL_SUM, True]
    assert torch.equal(outs[Reduction.PER_EXPERT, False], outs[Reduction.PER_EXPERT, True])
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.03 * exact.norm()  # 7 bits and a sign, twice


def test_a_link_is_slow_by_its_best_exchange_and_stays_so_in_between() -> None:
    speed = LinkSpeed(loopback=False)
    assert not speed.eight_bit(1 << 30)
    for seconds_a_byte, slow in ((4e-9, False), (8e-9, False)):  # the best counts
        speed.note(LARGE_BYTES, LARGE_BYTES, LARGE_BYTES * seconds_a_byte)
        assert speed.eight_bit(LARGE_BYTES) is slow
    speed = LinkSpeed(loopback=False)
    speed.note(4096, 8192, 1e-3)
    for seconds_a_byte, slow in ((8e-9, True), (4e-9, True), (1e-9, False), (4e-9, False)):
        speed.note(LARGE_BYTES, LARGE_BYTES, 1e-3 + LARGE_BYTES * seconds_a_byte)
        assert speed.eight_bit(1 << 20) is slow
    assert not speed.eight_bit(4096)


def routes_over(links: Sequence[FakeLink], experts: int) -> Routes:
    """Of a plan of one layer, each expert of which all links' nodes hold."""
    names = tuple(link.node for link in links)
    routes = Routes([1 << 20], False, lambda: None)
    routes.follow(Plan(1, ((names,) * experts,)), names)
    for link in links:
        routes.asking.connect(cast(Link, link))
    return routes


def test_many_tokens_go_where_pairs_are_computed_quickly_and_few_where_experts_are_read_quickly() -> None:
    experts, many = 8, 64
    links = FakeLink("a"), FakeLink("b")
    routes = routes_over(links, experts)

    def shares(tokens: int) -> list[int]:
        """Experts of each node, of tokens that are all sent to all."""
        owner = routes.owner(0, np.tile(np.arange(experts), (tokens, 1)))
        return np.bincount(owner, minlength=2).tolist()

    def answered(name: str, tokens: int, seconds: float) -> None:
        routes.speeds.of(NodeName(name)).note(tokens, tokens, 1 << 20, seconds, 0)

    assert shares(1) == shares(many) == [4, 4]  # nothing is known yet
    answered("a", 1, 3e-3)
    answered("b", 1, 1e-3)
    assert shares(1) == shares(many) == [2, 6]  # who reads slowly probably computes slowly
    answered("a", many, many * 1e-4)
    answered("b", many, many * 3e-4)
    assert shares(1) == [2, 6] and shares(many) == [6, 2]


def test_a_node_that_looks_late_at_its_messages_gets_none_for_a_while() -> None:
    links = FakeLink("a"), FakeLink("b")
    routes = routes_over(links, EXPERTS)
    ids = np.arange(6)[None]

    def asked() -> set[int]:
        return {int(routes.owner(0, ids)[expert]) for expert in ids[0]}

    for seconds in (0.001, 0.04) * 20:
        links[0].speed.note(4096, 8192, 0.001)
        links[1].speed.note(
            4096, 8192, seconds
        )  # as quick as ever at best, and busy with something else now and then
    assert asked() == {0}
    for _ in range(60 * UNHEARD):
        routes.tick()
    assert asked() == {0, 1}
    for link in links:  # both late is nobody's fault
        for _ in range(40):
            link.speed.note(4096, 8192, 0.04)
    assert asked() == {0, 1}
