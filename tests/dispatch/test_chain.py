"""Chunks that go from node to node: the sums are the star's, and whatever breaks a chain is done as a star."""

import asyncio
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import pytest
import torch

from moehive.coordinator.dispatch import spot_check
from moehive.coordinator.dispatch.dispatcher import Dispatcher
from moehive.coordinator.dispatch.link import MAX_IN_FLIGHT, Link, Peer
from moehive.coordinator.dispatch.parts import Part
from moehive.coordinator.dispatch.speed import LinkSpeed
from moehive.coordinator.dispatch.watch import Watch
from moehive.coordinator.dispatch.ways import RETRY, TRIALS, Ways
from moehive.coordinator.types import NodeName, Plan
from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.ops import ExpertOps, Reduction, load_expert
from moehive.proto import experts_pb2 as pb
from moehive.proto.chain import check_chain, next_request
from moehive.proto.tensors import (
    Reply,
    Request,
    parse_reply,
    parse_request,
    read_request,
    read_values,
    reply_pieces,
)

EXPERTS, TOP_K, HIDDEN = 16, 8, 128
SPEC = ExpertSpec(hidden_size=HIDDEN, intermediate_size=24, activation="silu", format="f32")
MANIFEST = Manifest("made-up", "0" * 64, (LayerGeometry(EXPERTS, TOP_K, SPEC),))
NAMES = tuple(NodeName(name) for name in "abcd")
A, B, C, D = NAMES
CHUNK = 256  # tokens
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # f32 added up in another order


def blob(expert: ExpertId) -> torch.Tensor:
    generator = torch.Generator().manual_seed(expert.expert)
    return build_blob(SPEC, {t.name: torch.randn(t.shape, generator=generator) * 0.2 for t in SPEC.tensors})


WEIGHTS = {e: load_expert(SPEC, blob(ExpertId(0, e))) for e in range(EXPERTS)}


class SlowSpeed(LinkSpeed):
    """A slow link that keeps its bits, so that sums can be compared."""

    slow = True
    round_trip_s = 1e-5
    s_per_byte = 1e-6

    def eight_bit(self, nbytes: int) -> bool:
        return False


class FakeNode:
    """A node and the link to it, in memory; `change` may change its rows or its reply."""

    def __init__(self, name: NodeName, nodes: dict[NodeName, "FakeNode"]) -> None:
        self.node = name
        self.address = f"{name}.example:1"
        self.speed: LinkSpeed = SlowSpeed(loopback=False)
        self.peer = Peer(others=MAX_IN_FLIGHT)  # a full link, for which no layer is a flight
        self.change: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
        self.refuses_chains = False
        self.asked: list[int] = []  # of each request from the coordinator: how many nodes were to answer
        self.later: list[float] = []  # how long each of them was held back, in seconds
        self._nodes = nodes
        self._ops = ExpertOps(1)

    def send(
        self, pieces: tuple[bytes, ...], nbytes: int, chained: bool = False, later: float = 0.0
    ) -> "asyncio.Future[Reply]":
        request = parse_request(b"".join(pieces))
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        if request.head.epoch == 0:
            future.set_result(Reply(pb.ComputeReply(), b""))
        else:
            self.asked.append(1 + len(request.head.chain))
            self.later.append(later)
            future.set_result(self.answer(request))
        return future

    def answer(self, whole: Request) -> Reply:
        hidden, routing = read_request(whole)
        request = whole.head
        rows = self._ops.moe_layer(
            SPEC, WEIGHTS, hidden, routing.offsets, routing.experts, routing.weights,
            Reduction.PER_EXPERT if request.reduction == pb.REDUCTION_PER_EXPERT else Reduction.PARTIAL_SUM,
        )  # fmt: skip
        rows = self.change(rows)
        reply = pb.ComputeReply(compute_ns=1_000_000)
        if request.chain:
            check_chain(whole)
            following = self._nodes[NodeName(request.chain[0].node_name)]
            if following.refuses_chains:
                refusal = pb.Refusal(sentence="No way there.", node_name=following.node)
                return Reply(pb.ComputeReply(refusal=refusal), b"")
            rest = following.answer(parse_request(b"".join(next_request(whole))))
            if rest.head.HasField("refusal"):
                return rest
            rows = rows + read_values(rest, len(rows), HIDDEN, hidden.dtype)
            reply.chain_ns.extend([rest.head.compute_ns, *rest.head.chain_ns])
        return parse_reply(b"".join(reply_pieces(reply, rows, request.dtype)))


class Cluster:
    """Nodes a to d; each expert is on two of them. `lies` are the nodes called liars."""

    def __init__(self, reduction: Reduction = Reduction.PARTIAL_SUM, chain: bool | None = True) -> None:
        self.lies: list[str] = []
        self.nodes: dict[NodeName, FakeNode] = {}
        for name in NAMES:
            self.nodes[name] = FakeNode(name, self.nodes)
        self.dispatcher = Dispatcher(
            MANIFEST, None, reduction, on_lie=lambda node, sentence: self.lies.append(node), wait_seconds=5, read=blob
        )
        self.dispatcher.chains.always = chain
        for node in self.nodes.values():
            self.dispatcher.connect(cast(Link, node))
        owners = tuple((NAMES[e % 4], NAMES[(e + 1) % 4]) for e in range(EXPERTS))
        self.dispatcher.follow(Plan(1, (owners,)))

    async def submit(self, tokens: int = CHUNK) -> torch.Tensor:
        return await self.dispatcher.submit(0, *inputs(tokens))

    @property
    def longest(self) -> int:
        """The most nodes that a request was for."""
        return max(count for node in self.nodes.values() for count in node.asked)


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator), ids, torch.rand(tokens, TOP_K, generator=generator)


async def star(tokens: int = CHUNK) -> torch.Tensor:
    return await Cluster(chain=False).submit(tokens)


def run(main: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("tokens", [CHUNK, 500, 2048])
def test_a_chain_answers_what_a_star_does_and_who_did_what_is_known(tokens: int) -> None:
    async def main() -> None:
        chain, plain = Cluster(), Cluster(chain=False)
        torch.testing.assert_close(await chain.submit(tokens), await plain.submit(tokens), **CLOSE)
        assert chain.longest == 4 and min(chain.nodes[A].asked) > 1
        assert not any(chain.nodes[name].asked for name in (B, C, D))
        pairs = {name: counters.expert_calls for name, counters in chain.dispatcher.counters.items()}
        assert pairs.keys() == set(NAMES) and sum(pairs.values()) == tokens * TOP_K
        assert all(counters.compute_ns for counters in chain.dispatcher.counters.values())

    run(main)


def test_large_messages_of_a_star_leave_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Part] = []
    monkeypatch.setattr(Watch, "add", lambda self, part: parts.append(part))
    monkeypatch.setattr(Watch, "remove", lambda self, part: None)

    async def main() -> None:
        cluster = Cluster(chain=False)
        await cluster.submit(tokens=2048)
        held = sorted(later for node in cluster.nodes.values() for later in node.later)
        assert held[0] == 0.0 and all(late - early > 0.5 for early, late in pairwise(held))  # each takes 1 s
        dues = sorted(part.due for part in parts)
        assert dues[-1] - dues[0] == pytest.approx(held[-1], abs=0.5)  # who is asked later has as long to answer
        await cluster.submit(tokens=64)
        assert [node.later[-1] for node in cluster.nodes.values()] == [0.0] * 4

    run(main)


def test_only_large_chunks_over_slow_links_go_as_a_chain_and_nothing_whose_bits_must_not_depend_on_it() -> None:
    async def main() -> None:
        for cluster, tokens in ((Cluster(), 8), (Cluster(Reduction.PER_EXPERT), CHUNK), (Cluster(), CHUNK)):
            if (tokens, cluster.dispatcher._reduction) == (CHUNK, Reduction.PARTIAL_SUM):
                for node in cluster.nodes.values():
                    node.speed = LinkSpeed(loopback=True)
            await cluster.submit(tokens)
            assert cluster.longest == 1

    run(main)


def test_tokens_without_experts_on_the_chain_and_experts_elsewhere() -> None:
    async def main() -> None:
        cluster = Cluster()
        hidden, ids, weights = inputs(CHUNK)
        ids[::16] = EXPERTS  # none
        plain = await Cluster(chain=False).dispatcher.submit(0, hidden, ids, weights)
        torch.testing.assert_close(await cluster.dispatcher.submit(0, hidden, ids, weights), plain, **CLOSE)
        assert not plain[::16].any() and cluster.longest == 4

    run(main)


def test_who_breaks_a_chain_is_asked_alone_until_it_has_rested() -> None:
    async def main() -> None:
        cluster = Cluster()
        cluster.nodes[C].refuses_chains = True
        for _ in range(2):
            for node in cluster.nodes.values():
                node.asked.clear()
            torch.testing.assert_close(await cluster.submit(), await star(), **CLOSE)
        assert cluster.longest == 3 and cluster.nodes[C].asked == [1] and not cluster.lies
        cluster.nodes[C].refuses_chains = False
        cluster.dispatcher.chains._rests.clear()
        await cluster.submit()
        assert cluster.longest == 4

    run(main)


def test_a_liar_in_a_chain_is_found_by_the_star() -> None:
    async def main() -> None:
        cluster = Cluster()
        cluster.nodes[B].change = lambda rows: rows * math.nan
        torch.testing.assert_close(await cluster.submit(), await star(), **CLOSE)
        assert set(cluster.lies) == {B}

    run(main)


def test_a_spot_check_of_a_chain_makes_each_of_its_nodes_a_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_check, "EVERY_LAYERS", 3)

    async def main() -> None:
        cluster = Cluster()
        cluster.nodes[C].change = lambda rows: rows * 3
        while not cluster.lies:
            await cluster.submit()
            await asyncio.sleep(0.01)
        assert set(cluster.lies) == {C}
        await cluster.dispatcher.stop()

    run(main)


def test_both_ways_are_tried_and_the_faster_one_is_kept() -> None:
    ways = Ways()
    for way, seconds in ((ways.star, 2.0), (ways.chain, 1.0)):
        for _ in range(TRIALS):
            assert ways.next() is way
            way.note(seconds)
    taken = [ways.next() for _ in range(4 * RETRY)]
    assert taken.count(ways.star) in (1, 2)  # twice as slow: half as often
    for _ in range(20):
        ways.chain.note(9.0)
    assert ways.next() is ways.star


def test_a_dispatcher_learns_which_way_is_faster() -> None:
    async def main() -> None:
        cluster = Cluster(chain=None)
        for _ in range(2 * TRIALS):
            await cluster.submit()
        (ways,) = cluster.dispatcher.chains._ways.values()
        assert ways.star.trials == ways.chain.trials == TRIALS
        assert ways.star.s_per_token < math.inf and ways.chain.s_per_token < math.inf

    run(main)
