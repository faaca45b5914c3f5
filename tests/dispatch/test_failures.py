"""Nodes that are gone, silent, refuse, lie or crawl: the layer's sum is right all the same, or waits."""

import asyncio
import ctypes
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import torch

from moehive.coordinator.dispatch import asking, spot_check, watch
from moehive.coordinator.dispatch.dispatcher import Dispatcher
from moehive.coordinator.dispatch.fallback import Fallback
from moehive.coordinator.dispatch.link import MAX_IN_FLIGHT, Link, Peer
from moehive.coordinator.dispatch.speed import LinkSpeed
from moehive.coordinator.types import NodeName, NodeUnavailable, Plan
from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.ops import ExpertOps, Reduction, load_expert
from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import Reply, Request, parse_reply, parse_request, read_request, reply_pieces
from moehive.proto.wire.windows import Times

EXPERTS, TOP_K, HIDDEN = 6, 3, 32
SPEC = ExpertSpec(hidden_size=HIDDEN, intermediate_size=24, activation="silu", format="f32")
MANIFEST = Manifest("made-up", "0" * 64, (LayerGeometry(EXPERTS, TOP_K, SPEC),))
A, B = NodeName("a"), NodeName("b")
BOTH = tuple((A, B) for _ in range(EXPERTS))
ONLY_A = tuple((A,) for _ in range(EXPERTS))

Behave = Callable[[pb.ComputeReply], Any]


def blob(expert: ExpertId) -> torch.Tensor:
    generator = torch.Generator().manual_seed(expert.expert)
    return build_blob(SPEC, {t.name: torch.randn(t.shape, generator=generator) * 0.2 for t in SPEC.tensors})


WEIGHTS = {e: load_expert(SPEC, blob(ExpertId(0, e))) for e in range(EXPERTS)}


class FakeLink:
    """A node in memory. `behave` may change a reply; what it returns other than None is the reply's future.

    Of a `full` link no layer is a flight.
    """

    full = False
    waits = False

    def __init__(self, node: NodeName, behave: Behave = lambda reply: None) -> None:
        self.node = node
        self.behave = behave
        self.speed = LinkSpeed(loopback=True)
        self.peer = Peer(next_id=1, others=MAX_IN_FLIGHT if self.full else 0)
        self.peer_at = ctypes.addressof(self.peer)
        self.flights: Any = None
        self.asked = 0
        self.was_asked = asyncio.Event()
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.answers_probes = True
        self._ops = ExpertOps(1)

    def send(
        self, pieces: tuple[bytes, ...], nbytes: int, chained: bool = False, later: float = 0.0
    ) -> "asyncio.Future[Reply]":
        whole = parse_request(b"".join(pieces))
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        if whole.head.epoch == 0:
            if self.answers_probes:
                future.set_result(Reply(pb.ComputeReply(), b""))
            return future
        outcome, reply = self._answer(whole)
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        elif outcome is not None:
            return cast("asyncio.Future[Reply]", outcome)
        else:
            future.set_result(parse_reply(reply))
        return future

    def send_flight(self, where: int, size: int, taken: int) -> None:
        outcome, reply = self._answer(parse_request(ctypes.string_at(where, size)))
        loop = asyncio.get_running_loop()
        if isinstance(outcome, Exception):
            loop.call_soon(self.flights.lost, self, outcome)
        elif outcome is None:
            loop.call_soon(self._deliver, reply)

    def _deliver(self, reply: bytes) -> None:
        if not self.flights.take(self, reply, Times()):
            self.flights.take_strange(self, parse_reply(reply))

    def _answer(self, whole: Request) -> tuple[Any, bytes]:
        request = whole.head
        self.asked += 1
        self.was_asked.set()
        hidden, routing = read_request(whole)
        reduction = Reduction.PER_EXPERT if request.reduction == pb.REDUCTION_PER_EXPERT else Reduction.PARTIAL_SUM
        rows = self._ops.moe_layer(
            SPEC, WEIGHTS, hidden, routing.offsets, routing.experts, routing.weights, reduction
        )
        pieces = reply_pieces(pb.ComputeReply(id=request.id, compute_ns=1000), rows, request.dtype)
        reply = pb.ComputeReply.FromString(b"".join(pieces))
        return self.behave(reply), reply.SerializeToString()

    async def close(self, sentence: str) -> None:
        self.closed.set_result(sentence)


def silent(reply: pb.ComputeReply) -> Any:
    return asyncio.get_running_loop().create_future()


def gone(reply: pb.ComputeReply) -> Any:
    return NodeUnavailable("a", "Node a ended the connection.")


def not_a_number(reply: pb.ComputeReply) -> None:
    rows = torch.frombuffer(bytearray(reply.values), dtype=torch.float32)
    rows[3] = float("nan")
    reply.values = rows.numpy().tobytes()


def cut_short(reply: pb.ComputeReply) -> None:
    reply.values = reply.values[:-4]


def refuses(reply: pb.ComputeReply) -> None:
    reply.refusal.sentence = "No memory is left."


class Case:
    """A dispatcher over node a, which misbehaves, and maybe node b; `lies` are the nodes called liars."""

    def __init__(
        self, owners: Any, behave: Behave, reduction: Reduction, fallback: Fallback | None = None, read: Any = None
    ) -> None:
        self.lies: list[tuple[str, str]] = []
        self.dispatcher = Dispatcher(
            MANIFEST,
            None,
            reduction,
            fallback,
            lambda node, sentence: self.lies.append((node, sentence)),
            5.0,
            read=read,
        )
        self.links = {A: FakeLink(A, behave), B: FakeLink(B)}
        self.dispatcher.connect(cast(Link, self.links[A]))
        if owners is BOTH:
            self.dispatcher.connect(cast(Link, self.links[B]))
        self.dispatcher.follow(Plan(1, (owners,)))

    def submit(self, tokens: int) -> Awaitable[torch.Tensor]:
        return self.dispatcher.submit(0, *inputs(tokens))


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator), ids, torch.rand(tokens, TOP_K, generator=generator)


async def wanted(tokens: int, reduction: Reduction) -> torch.Tensor:
    return await Case(BOTH, lambda reply: None, reduction).submit(tokens)


@pytest.fixture(autouse=True, params=[False, True], ids=["flights", "full links"])
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLink, "full", request.param)
    for name in ("FIRST_SECONDS", "SILENT_SECONDS"):
        monkeypatch.setattr(watch, name, 0.1)
    monkeypatch.setattr(asking, "REST_SECONDS", 0.05)
    monkeypatch.setattr(asking, "LOST_SECONDS", 0.2)


@pytest.mark.parametrize("reduction", list(Reduction))
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("behave", [gone, silent, refuses, cut_short, not_a_number])
def test_what_a_node_fails_at_its_replica_does(
    behave: Behave, tokens: int, reduction: Reduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "REST_SECONDS", 60.0)  # it is not probed while the test runs

    async def main() -> None:
        case = Case(BOTH, behave, reduction)
        right = await wanted(tokens, reduction)
        for _ in range(3):
            got = await asyncio.wait_for(case.submit(tokens), 5)
            if reduction is Reduction.PER_EXPERT:
                assert torch.equal(got, right)
            else:
                torch.testing.assert_close(got, right)
        assert case.links[A].asked == 1  # not again before it has answered a probe
        assert case.dispatcher.counters[A].failed == 1 or behave is not_a_number
        assert bool(case.lies) is (behave in (cut_short, not_a_number))

    asyncio.run(main())


def test_a_number_that_is_none_in_the_question_is_nobodys_lie() -> None:
    async def main() -> None:
        case = Case(BOTH, lambda reply: None, Reduction.PARTIAL_SUM)
        hidden, ids, weights = inputs(2)
        hidden[1, 4] = float("nan")
        got = await case.dispatcher.submit(0, hidden, ids, weights)
        assert got[1].isnan().any() and not case.lies

    asyncio.run(main())


def test_a_node_that_answers_a_probe_is_asked_again() -> None:
    async def main() -> None:
        case = Case(BOTH, gone, Reduction.PARTIAL_SUM)
        await case.submit(1)
        case.links[A].behave = lambda reply: None
        async with asyncio.timeout(5):
            while case.links[A].asked < 2:
                await case.submit(7)
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_node_that_answers_no_probe_loses_its_link() -> None:
    async def main() -> None:
        case = Case(BOTH, silent, Reduction.PARTIAL_SUM)
        case.links[A].answers_probes = False
        await case.submit(1)
        assert "Node a has answered nothing" in await asyncio.wait_for(case.links[A].closed, 5)

    asyncio.run(main())


@pytest.mark.parametrize("reduction", list(Reduction))
@pytest.mark.parametrize("behave", [gone, silent, refuses, not_a_number])
@pytest.mark.parametrize("room", [1, 2, EXPERTS])
def test_without_a_replica_the_coordinator_reads_the_experts(room: int, behave: Behave, reduction: Reduction) -> None:
    async def main() -> None:
        fallback = Fallback(MANIFEST, blob, room * SPEC.nbytes, threads=1)
        case = Case(ONLY_A, behave, reduction, fallback)
        for tokens in (1, 7):
            got = await asyncio.wait_for(case.submit(tokens), 5)
            torch.testing.assert_close(got, await wanted(tokens, reduction))
        assert fallback.held <= room
        await fallback.stop()

    asyncio.run(main())


def test_two_liars_are_both_found() -> None:
    async def main() -> None:
        case = Case(BOTH, not_a_number, Reduction.PER_EXPERT, Fallback(MANIFEST, blob, 1 << 20, threads=1))
        case.links[B].behave = not_a_number
        assert torch.equal(await case.submit(7), await wanted(7, Reduction.PER_EXPERT))
        assert {node for node, _ in case.lies} == {A, B}

    asyncio.run(main())


def test_a_liar_that_nobody_can_replace_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        case = Case(ONLY_A, not_a_number, Reduction.PARTIAL_SUM)
        monkeypatch.setattr(case.dispatcher._recovery, "_wait_seconds", 0.2)
        with pytest.raises(NodeUnavailable, match="Node a"):
            await case.submit(1)

    asyncio.run(main())


@pytest.mark.parametrize("reduction", list(Reduction))
@pytest.mark.parametrize("honest", [False, True])
def test_a_spot_check_finds_wrong_sums(honest: bool, reduction: Reduction, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(reply: pb.ComputeReply) -> None:
        rows = torch.frombuffer(bytearray(reply.values), dtype=torch.float32) * 1.5
        reply.values = rows.numpy().tobytes()

    async def main() -> None:
        monkeypatch.setattr(spot_check, "EVERY_LAYERS", 2)
        case = Case(ONLY_A, (lambda reply: None) if honest else wrong, reduction, read=blob)
        check = case.dispatcher._spot_check
        assert check is not None
        async with asyncio.timeout(5):
            while check.checked < 3 and not case.lies:
                await case.submit(7)
                await asyncio.sleep(0.01)
        assert [node for node, _ in case.lies] == ([] if honest else [A])
        await case.dispatcher.stop()

    asyncio.run(main())


def test_a_checkpoint_that_cant_be_read_makes_the_layer_wait_for_its_node() -> None:
    def unreadable(expert: ExpertId) -> torch.Tensor:
        raise OSError("The disk is gone.")

    async def main() -> None:
        case = Case(ONLY_A, gone, Reduction.PARTIAL_SUM, Fallback(MANIFEST, unreadable, 1 << 20, threads=1))
        waiting = asyncio.ensure_future(case.submit(3))
        await case.links[A].was_asked.wait()
        case.dispatcher.disconnect(cast(Link, case.links[A]))
        await asyncio.sleep(0)
        assert not waiting.done() and case.dispatcher.lost == EXPERTS
        case.dispatcher.connect(cast(Link, FakeLink(A)))
        torch.testing.assert_close(await asyncio.wait_for(waiting, 5), await wanted(3, Reduction.PARTIAL_SUM))

    asyncio.run(main())


def test_what_waits_too_long_ends_with_the_nodes_name() -> None:
    async def main() -> None:
        alone = Dispatcher(MANIFEST, None, Reduction.PARTIAL_SUM, wait_seconds=0.05)
        alone.follow(Plan(1, (ONLY_A,)))
        with pytest.raises(NodeUnavailable, match="Node a is away") as caught:
            await alone.submit(0, *inputs(2))
        assert caught.value.node == "a"

    asyncio.run(main())


def test_who_holds_nothing_is_not_asked() -> None:
    async def main() -> None:
        case = Case(BOTH, lambda reply: None, Reduction.PARTIAL_SUM)
        case.dispatcher.holding({B})
        await case.submit(5)
        assert (case.links[A].asked, case.links[B].asked) == (0, 1)

    asyncio.run(main())


def test_a_cancelled_layer_is_cancelled_even_while_it_recovers() -> None:
    async def main() -> None:
        case = Case(ONLY_A, gone, Reduction.PARTIAL_SUM)
        task = asyncio.ensure_future(case.submit(3))
        await case.links[A].was_asked.wait()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
