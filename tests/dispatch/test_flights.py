"""Flights: their sums are those of larger layers, and no reply, however strange, is taken for another one."""

import asyncio
import ctypes
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.dispatch import sums
from moehive.coordinator.dispatch.dispatcher import Dispatcher
from moehive.coordinator.dispatch.flight import Flight
from moehive.coordinator.dispatch.link import MAX_IN_FLIGHT, Link, Peer
from moehive.coordinator.dispatch.parts import Sent
from moehive.coordinator.dispatch.rows import Rows, add_up
from moehive.coordinator.dispatch.speed import LinkSpeed
from moehive.coordinator.types import NodeName, NodeUnavailable, Plan
from moehive.kernels.geometry import ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.ops import Reduction
from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import parse_reply, parse_request, read_request, rows_tensor
from moehive.proto.wire.windows import HEAD_BYTES, Inlet, Times

HIDDEN, TOP_K = 24, 3


class Quiet:
    """A link to a node that answers what the test says."""

    def __init__(self, node: str) -> None:
        self.node = NodeName(node)
        self.speed = LinkSpeed(loopback=True)
        self.peer = Peer(next_id=ord(node))
        self.peer_at = ctypes.addressof(self.peer)
        self.flights: Any = None
        self.asked: list[bytes] = []

    def send_flight(self, where: int, size: int, taken: int) -> None:
        self.asked.append(ctypes.string_at(where, size))


def dispatcher(owners: list[str], reduction: Reduction) -> tuple[Dispatcher, dict[str, Quiet]]:
    spec = ExpertSpec(hidden_size=HIDDEN, intermediate_size=8, activation="silu", format="f32")
    made = Dispatcher(Manifest("made-up", "0" * 64, (LayerGeometry(len(owners), TOP_K, spec),)), None, reduction)
    links = {name: Quiet(name) for name in sorted(set(owners))}
    for link in links.values():
        made.connect(cast(Link, link))
    made.follow(Plan(1, (tuple((NodeName(name),) for name in owners),)))
    return made, links


def sent(hidden: torch.Tensor, ids: Any, step: int = 1) -> Sent:
    return Sent(0, hidden, ids, np.ones(ids.shape, np.float32), None, lambda part: None, step)


def begin(made: Dispatcher, tokens: int, dtype: torch.dtype, ids: Any = None) -> Flight:
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    if ids is None:
        ids = np.arange(tokens * TOP_K).reshape(tokens, TOP_K) % 4
    flight = made._flights.ask(sent(hidden, ids))
    assert flight is not None
    made._flights.wait(flight)
    return flight


def over(flight: Flight) -> bool:
    assert flight.done is not None
    return flight.done.done()


def answer(message: bytes, rows: torch.Tensor) -> bytes:
    request = parse_request(message).head
    values = rows.contiguous().view(torch.uint8).numpy().tobytes()
    return pb.ComputeReply(id=request.id, compute_ns=1000, rows=len(rows), values=values).SerializeToString()


@given(st.data(), st.sampled_from(list(Reduction)), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_a_flight_asks_and_adds_up_what_a_larger_layer_would(
    data: st.DataObject, reduction: Reduction, dtype: torch.dtype
) -> None:
    owners = data.draw(st.lists(st.sampled_from("abc"), min_size=TOP_K, max_size=9))
    tokens = data.draw(st.integers(1, 9))
    numbers = st.lists(st.integers(-1, len(owners)), min_size=tokens * TOP_K, max_size=tokens * TOP_K)
    ids = np.array(data.draw(numbers)).reshape(tokens, TOP_K)  # some of no expert

    async def main() -> None:
        made, links = dispatcher(owners, reduction)
        flight = begin(made, tokens, dtype, ids)
        parts = []
        for number, share in enumerate(flight.shares()):
            link = cast(Quiet, flight.links[number])
            (message,) = link.asked
            hidden, routing = read_request(parse_request(message))
            assert torch.equal(hidden, flight.sent.hidden[torch.from_numpy(share.tokens)])
            assert all(np.array_equal(a, b) for a, b in zip(routing, share.routing, strict=True))
            pairs = reduction is Reduction.PER_EXPERT
            rows = torch.randn(len(share.pairs) if pairs else len(share.tokens), HIDDEN).to(dtype)
            parts.append(Rows(share, link.node, rows_tensor(answer_values(rows), dtype, *rows.shape)))
            assert not over(flight)
            assert made._flights.take(cast(Link, link), answer(message, rows), Times())
        assert over(flight) and flight.plain
        total, finite = made._flights.sum(flight)
        assert finite and torch.equal(total, add_up(parts, (tokens, TOP_K), flight.sent.hidden, reduction).total)
        asked = {link.node: len(link.asked) for link in links.values() if link.asked}
        assert {node: made.counters[node].requests for node in asked} == asked
        made._flights.release(flight)
        assert all(link.peer.flying == 0 for link in links.values())

    asyncio.run(main())


def answer_values(rows: torch.Tensor) -> bytes:
    return bytes(rows.contiguous().view(torch.uint8).numpy().tobytes())


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_reply_that_is_changed_is_taken_whole_or_left(data: st.DataObject) -> None:
    async def main() -> None:
        made, links = dispatcher(["a", "b", "a", "b"], Reduction.PARTIAL_SUM)
        flight = begin(made, 2, torch.float32)
        link = links["a"]
        reply = bytearray(answer(link.asked[0], torch.ones(2, HIDDEN)))
        for _ in range(data.draw(st.integers(0, 3))):
            reply[data.draw(st.integers(0, len(reply) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(reply[: data.draw(st.integers(0, len(reply)))]) + data.draw(st.binary(max_size=4))
        if made._flights.take(cast(Link, link), cut, Times()):
            assert parse_reply(cut).head.rows == 2 and len(parse_reply(cut).values) == 8 * HIDDEN
            assert flight.view.waiting == 1
        else:
            assert flight.view.waiting == 2 and link.peer.flying == 1
        made._flights.release(flight)

    asyncio.run(main())


@given(st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_nonsense_is_no_reply(message: bytes) -> None:
    async def main() -> None:
        made, links = dispatcher(["a"] * 4, Reduction.PARTIAL_SUM)
        flight = begin(made, 1, torch.float32)
        assert not made._flights.take(cast(Link, links["a"]), message, Times())
        made._flights.release(flight)

    asyncio.run(main())


def test_a_reply_of_another_link_or_another_layer_is_not_taken() -> None:
    async def main() -> None:
        made, links = dispatcher(["a", "b", "a", "b"], Reduction.PARTIAL_SUM)
        flight, next_one = begin(made, 1, torch.float32), begin(made, 1, torch.float32)
        first, second = links["a"].asked
        reply = answer(first, torch.ones(1, HIDDEN))
        assert not made._flights.take(cast(Link, links["b"]), reply, Times())
        assert made._flights.take(cast(Link, links["a"]), reply, Times())
        assert not made._flights.take(cast(Link, links["a"]), reply, Times())  # not twice
        assert (flight.view.waiting, next_one.view.waiting) == (1, 2)
        made._flights.release(next_one)
        assert not made._flights.take(
            cast(Link, links["a"]), answer(second, torch.ones(1, HIDDEN)), Times()
        )  # given up
        made._flights.release(flight)

    asyncio.run(main())


def test_what_is_dropped_or_lost_leaves_nothing_in_hand() -> None:
    async def main() -> None:
        made, links = dispatcher(["a", "b", "a", "b"], Reduction.PARTIAL_SUM)
        for link in links.values():  # so that something is expected of it
            made._speeds.of(link.node).note(1, 1, 1000, 1e-3, 0)
        hidden, ids, weights = torch.randn(1, HIDDEN), torch.tensor([[0, 1, 2]]), torch.ones(1, TOP_K)
        speeds = [made._speeds.of(link.node) for link in links.values()]
        for waits in (False, True):
            layer = made.submit(0, hidden, ids, weights)
            assert all(link.peer.flying == 1 for link in links.values()) and all(s.backlog_s > 0 for s in speeds)
            if waits:
                waiting = asyncio.ensure_future(layer)
                await asyncio.sleep(0)
                assert made._flights._lookout.expected == 1
                waiting.cancel()
                await asyncio.wait([waiting])
                del waiting
            del layer
            assert made._flights._lookout.expected == 0
            assert all(link.peer.flying == 0 for link in links.values()) and not any(s.backlog_s for s in speeds)
        flight = begin(made, 1, torch.float32)
        made._flights.lost(cast(Link, links["a"]), NodeUnavailable(NodeName("a"), "Node a is gone."))
        assert not over(flight) and links["a"].peer.flying == 0 and not speeds[0].backlog_s
        assert made._flights.take(
            cast(Link, links["b"]), answer(links["b"].asked[-1], torch.ones(1, HIDDEN)), Times()
        )
        assert over(flight) and not flight.plain
        assert made._flights._lookout.expected == 0
        parts, failed = made._flights.apart(flight)
        assert [rows.node for rows in parts] == ["b"] and [share.pairs.tolist() for share in failed] == [[0, 2]]
        assert torch.equal(parts[0].values, torch.ones(1, HIDDEN))
        made._flights.release(flight)

    asyncio.run(main())


@pytest.mark.parametrize("tokens", [1, 32])
def test_a_link_takes_so_many_flights_and_no_more(tokens: int) -> None:
    async def main() -> None:
        made, links = dispatcher(["a"] * 4, Reduction.PARTIAL_SUM)
        flights = [begin(made, tokens, torch.float32) for _ in range(MAX_IN_FLIGHT)]
        hidden, ids = torch.randn(tokens, HIDDEN), np.zeros((tokens, TOP_K), np.int64)
        assert made._flights.ask(sent(hidden, ids)) is None
        for flight in flights:
            made._flights.release(flight)
        assert links["a"].peer.flying == 0
        made._flights.release(begin(made, tokens, torch.float32))

    asyncio.run(main())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux says who ran where")
def test_who_has_this_processor_is_asked_last() -> None:
    async def main() -> None:
        made, links = dispatcher(["a", "b", "a", "b"], Reduction.PARTIAL_SUM)
        hidden, ids = torch.ones(1, HIDDEN), np.arange(TOP_K).reshape(1, TOP_K)
        here = sorted(os.sched_getaffinity(0))[0]
        os.sched_setaffinity(0, {here})
        order: list[str] = []

        def outlet(name: str) -> Any:
            def send(sending: int, windows: int, message: int, size: int) -> int:
                order.append(name)
                return size + HEAD_BYTES

            return ctypes.CFUNCTYPE(*(ctypes.c_int64,) * 5)(send)

        outlets = {name: outlet(name) for name in links}
        for name, link in links.items():
            link.peer.outlet.send = ctypes.cast(outlets[name], ctypes.c_void_p).value
        for ran_here, wanted in (("a", "ba"), ("b", "ab"), ("", "ab"), ("ab", "ab")):
            with ExitStack() as ends:
                inlets = {}
                for name, link in links.items():
                    there = here if name in ran_here else None
                    inlets[name] = Inlet(descriptor=ends.enter_context(received(there)))
                    link.peer.inlet = ctypes.addressof(inlets[name])
                for turn in range(2):  # the first one finds out
                    order.clear()
                    flight = made._flights.ask(sent(hidden, ids, turn))
                    assert flight is not None
                    made._flights.release(flight)
                assert order == list(wanted)

    with ThreadPoolExecutor(1) as thread:  # this one keeps its processors
        thread.submit(asyncio.run, main()).result()


@contextmanager
def received(processor: int | None) -> Iterator[int]:
    """The descriptor of a connection that bytes have come to, sent from a processor; None: nobody knows where."""
    if processor is None:
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
        theirs.send(b"?")  # by this thread, which has that processor
    with ours, theirs:
        yield ours.fileno()


def test_memory_that_is_asked_with_again_is_read_again() -> None:
    async def main() -> None:
        made, links = dispatcher(["a"] * 4, Reduction.PARTIAL_SUM)
        hidden, ids = torch.ones(1, HIDDEN), np.zeros((1, TOP_K), np.int64)
        one = sent(hidden, ids)
        for expert in range(3):
            hidden[:] = expert
            ids[0] = expert, 3, 3
            flight = made._flights.ask(one)
            assert flight is not None
            got, routing = read_request(parse_request(links["a"].asked[-1]))
            assert torch.equal(got, hidden) and routing.experts.tolist() == [expert, 3, 3]
            made._flights.release(flight)

    asyncio.run(main())


def test_only_a_sum_that_was_given_back_is_written_over() -> None:
    async def main() -> None:
        made, links = dispatcher(["a"] * 4, Reduction.PARTIAL_SUM)

        def next_sum(value: float) -> torch.Tensor:
            flight = begin(made, 1, torch.float32)
            assert made._flights.take(
                cast(Link, links["a"]), answer(links["a"].asked[-1], torch.full((1, HIDDEN), value)), Times()
            )
            total, _ = made._flights.sum(flight)
            made._flights.release(flight)
            return total

        found = [next_sum(float(number)) for number in range(2 * sums.MAX_LENT)]
        assert [float(total[0, 0]) for total in found] == list(range(2 * sums.MAX_LENT))
        made.take_back(found[-1])
        assert next_sum(-1.0) is found[-1]
        made.take_back(torch.ones(1, HIDDEN))  # nobody's
        assert all(next_sum(-2.0) is not total for total in found)

    asyncio.run(main())
