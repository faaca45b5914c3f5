"""Flights whose answers are waited for in native code, over real streams from nodes on a thread of their own."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest
import torch
import uvloop
from loops import LoopInAThread, loop_in_a_thread

from moehive.coordinator.bench.certificates import node_identity
from moehive.coordinator.cluster.trust import Authority
from moehive.coordinator.dispatch import flights
from moehive.coordinator.dispatch.dispatcher import Dispatcher
from moehive.coordinator.dispatch.flight import Flight
from moehive.coordinator.dispatch.flights import Flights
from moehive.coordinator.dispatch.link import Link
from moehive.coordinator.types import NodeName, Plan
from moehive.kernels.geometry import ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.ops import Reduction
from moehive.proto import experts_pb2 as pb
from moehive.proto import experts_pb2_grpc
from moehive.proto.channel import node_dns_name
from moehive.proto.interceptor import CallGuard
from moehive.proto.wire import frames
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.messages import prefix
from moehive.proto.wire.server import Context, Server
from moehive.proto.wire.tls import server_context

HIDDEN, TOP_K, LAYERS, SECONDS = 24, 2, 40, 30
NODES = {"a": 1.0, "b": 10.0}  # what a row of each is full of, times the request's step

Answer: TypeAlias = Callable[[bytes, Context], Awaitable[None]]


async def usually(reply: bytes, context: Context) -> None:
    await context.write((reply,))


async def with_pings(reply: bytes, context: Context) -> None:
    """What comes with the reply is not the stream's."""
    connection = context._stream._connection
    connection._ping()
    await context.write((reply,))
    connection._ping()


async def in_pieces(reply: bytes, context: Context) -> None:
    stream = context._stream
    whole = frames.frame(frames.DATA, 0, stream.number, prefix(len(reply)) + reply)
    transport = stream._connection._transport
    transport.write(whole[:20])
    for _ in range(50):  # turns, in which the first piece may be read
        await asyncio.sleep(0)
    transport.write(whole[20:])


async def otherwise_written(reply: bytes, context: Context) -> None:
    """Native code leaves replies to Python that do not begin with their number."""
    head = pb.ComputeReply(id=pb.ComputeReply.FromString(reply).id).SerializeToString()
    await context.write((reply[len(head) :] + head,))


class Node(experts_pb2_grpc.ExpertsServicer):
    def __init__(self, full_of: float) -> None:
        self.full_of = full_of
        self.answer: Answer = usually

    async def Compute(self, request_iterator: Any, context: Context) -> None:
        while (message := await context.read_message()) is not None:
            request = pb.ComputeRequest.FromString(bytes(message))
            if request.epoch == 0:
                await context.write(pb.ComputeReply(id=request.id))  # a probe
                continue
            row = torch.full((request.tokens, HIDDEN), self.full_of * request.step)
            reply = pb.ComputeReply(id=request.id, compute_ns=1, rows=request.tokens, values=row.numpy().tobytes())
            await self.answer(reply.SerializeToString(), context)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[LoopInAThread]:
    with loop_in_a_thread() as loop:
        yield loop


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def secure(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def came(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a flight landed, and how often it was waited for on the event loop."""
    count: Counter[str] = Counter()
    land, wait = Flights.land, Flights.wait

    def landed(self: Flights, flight: Flight) -> torch.Tensor | None:
        total = land(self, flight)
        count["landed"] += total is not None
        return total

    def waited(self: Flights, flight: Flight) -> "asyncio.Future[None]":
        count["awaited"] += 1
        return wait(self, flight)

    monkeypatch.setattr(Flights, "land", landed)
    monkeypatch.setattr(Flights, "wait", waited)
    return count


@asynccontextmanager
async def cluster(
    elsewhere: LoopInAThread, authority: Authority | None, owners: list[tuple[str, ...]]
) -> AsyncIterator[tuple[Dispatcher, dict[str, Node]]]:
    """A dispatcher, linked to nodes of one layer whose experts these hold."""
    nodes = {name: Node(full_of) for name, full_of in NODES.items()}
    servers = []

    async def serve(name: str) -> int:
        server = Server(CallGuard({}))
        experts_pb2_grpc.add_ExpertsServicer_to_server(nodes[name], server)
        servers.append(server)
        identity = None if authority is None else node_identity(authority, name)
        return await server.listen("127.0.0.1", 0, None if identity is None else server_context(lambda: identity))

    spec = ExpertSpec(hidden_size=HIDDEN, intermediate_size=8, activation="silu", format="f32")
    made = Dispatcher(
        Manifest("made-up", "0" * 64, (LayerGeometry(len(owners), TOP_K, spec),)), None, Reduction.PARTIAL_SUM
    )
    links = []
    for name in nodes:
        address = f"127.0.0.1:{elsewhere.run(serve(name))}"
        ours = None if authority is None else authority.issue_coordinator()
        link = Link(NodeName(name), address, Channel(address, ours, node_dns_name(name)), lambda: None)
        await link.open()
        made.connect(link)
        links.append(link)
    made.follow(Plan(1, (tuple(tuple(NodeName(name) for name in holders) for holders in owners),)))
    try:
        yield made, nodes
    finally:
        for link in links:
            await link.close("The test is over.")
        for server in servers:
            elsewhere.run(server.stop(0))


async def layer(made: Dispatcher) -> torch.Tensor:
    ids = torch.arange(TOP_K)[None]
    return await made.submit(0, torch.ones(1, HIDDEN), ids, torch.ones(1, TOP_K))


def run(main: Callable[[], Awaitable[None]]) -> None:
    uvloop.run(asyncio.wait_for(main(), SECONDS))


@pytest.mark.parametrize("answer", [usually, with_pings, in_pieces, otherwise_written])
def test_every_answer_is_added_up_once_however_it_comes(
    elsewhere: LoopInAThread, authority: Authority, secure: bool, came: Counter[str], answer: Answer
) -> None:
    async def main() -> None:
        async with cluster(elsewhere, authority if secure else None, [("a",), ("b",)]) as (made, nodes):
            nodes["b"].answer = answer
            for step in range(1, LAYERS + 1):
                total = await layer(made)
                assert torch.equal(total, torch.full((1, HIDDEN), step * sum(NODES.values()))), step
                made.take_back(total)
            assert {name: made.counters[NodeName(name)].requests for name in NODES} == dict.fromkeys(NODES, LAYERS)

    run(main)
    assert came["landed"] + came["awaited"] == LAYERS
    if answer is usually:
        assert came["landed"]
    if answer is otherwise_written:
        assert came["awaited"] == LAYERS


def test_what_was_read_natively_is_credited(
    elsewhere: LoopInAThread, authority: Authority, secure: bool, came: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a node could send no more one day."""
    monkeypatch.setattr(flights, "OWED_BYTES", 1000)

    async def main() -> None:
        async with cluster(elsewhere, authority if secure else None, [("a",), ("b",)]) as (made, _):
            stream = made.link(NodeName("a"))._stream  # type: ignore[union-attr]
            assert stream is not None
            stream._credit, full = 1000, stream.windows.receive
            least = full
            for _ in range(200):
                await layer(made)
                least = min(least, stream.windows.receive)
            assert full - 3000 < least < full - 500

    run(main)
    assert came["landed"]


def test_the_loop_has_its_turns_while_a_node_is_late(
    elsewhere: LoopInAThread, authority: Authority, secure: bool, came: Counter[str]
) -> None:
    asked = asyncio.Event()  # of the nodes' loop

    async def when_asked_to(reply: bytes, context: Context) -> None:
        await asked.wait()
        await context.write((reply,))

    async def main() -> None:
        async with cluster(elsewhere, authority if secure else None, [("a",), ("b",)]) as (made, nodes):
            await layer(made)
            nodes["a"].answer = when_asked_to
            waiting = asyncio.ensure_future(layer(made))
            asyncio.get_running_loop().call_later(0.01, elsewhere.loop.call_soon_threadsafe, asked.set)
            assert torch.equal(await waiting, torch.full((1, HIDDEN), 2 * sum(NODES.values())))

    run(main)
    assert came["awaited"]


def test_others_have_turns_between_layers_that_land_at_once(
    elsewhere: LoopInAThread, authority: Authority, came: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flights, "TURN_SECONDS", 0.0)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def main() -> None:
        async with cluster(elsewhere, authority, [("a",), ("b",)]) as (made, _):
            task = asyncio.create_task(other())
            await asyncio.sleep(0)  # it has begun
            for _ in range(LAYERS):
                before = turns
                await layer(made)
                assert turns > before
            task.cancel()

    run(main)
    assert came["landed"]


def test_two_passes_at_once_take_turns(
    elsewhere: LoopInAThread, authority: Authority, secure: bool, came: Counter[str]
) -> None:
    async def main() -> None:
        async with cluster(elsewhere, authority if secure else None, [("a",), ("b",)]) as (made, _):

            async def one_pass() -> list[float]:
                return [float((await layer(made))[0, 0]) for _ in range(LAYERS)]

            found = await asyncio.gather(one_pass(), one_pass())
            steps = [value / sum(NODES.values()) for totals in found for value in totals]
            assert sorted(steps) == list(range(1, 2 * LAYERS + 1))

    run(main)


def test_a_node_that_dies_is_replaced_while_it_is_waited_for(
    elsewhere: LoopInAThread, authority: Authority, secure: bool
) -> None:
    died: list[str] = []

    async def dies(reply: bytes, context: Context) -> None:
        died.append("a")
        context._stream._connection._transport.abort()

    async def main() -> None:
        async with cluster(elsewhere, authority if secure else None, [("a", "b"), ("b",)]) as (made, nodes):
            await layer(made)
            nodes["a"].answer = dies
            made._speeds.of(NodeName("b")).backlog_s = 1.0  # so that the first expert is asked of a
            assert torch.equal(await layer(made), torch.full((1, HIDDEN), 2 * 2 * NODES["b"]))  # both shares, step 2
        assert died

    run(main)
