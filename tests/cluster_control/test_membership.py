"""Nodes that come, go and come back, over real streams: who is told what, and by which plan requests go."""

import asyncio

import grpc
import grpc.aio
import pytest

from moehive.coordinator.cluster import membership
from moehive.coordinator.cluster.drains import ask_drain, drains
from moehive.coordinator.cluster.records import readmit_node, revoke_node
from moehive.coordinator.cluster.state import Phase
from moehive.coordinator.types import LOCAL, CoordinatorError, Plan
from moehive.kernels.geometry import Manifest
from moehive.kernels.manifest import from_bytes
from moehive.proto import cluster_pb2 as pb
from moehive.proto.handshake import metadata


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The clock's work is done often, and the time after a switch is short; silence stays as it is."""
    monkeypatch.setattr(membership, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(membership, "SETTLE_SECONDS", 0.05)


def experts_of(assign):
    return {(layer.layer, expert) for layer in assign.layers for expert in layer.experts}


def all_experts(manifest):
    return {(at, expert) for at, layer in enumerate(manifest.layers) for expert in range(layer.experts)}


def test_the_first_plan_is_made_when_enough_nodes_are_here(cluster, manifest):
    async def main():
        async with cluster(min_nodes=3) as harness:
            nodes = [await harness.join(name) for name in ("a", "b", "c")]
            for node in nodes[:2]:
                await node.attend()
            await harness.until(lambda: len(harness.membership.state.nodes) == 2)
            assert harness.membership.state.pending is None
            assert "2 of 3 expert nodes are here; start 1 more" in harness.membership.reason()
            await nodes[2].attend()
            assigns = [await node.hear_assign() for node in nodes]
            assert {assign.epoch for assign in assigns} == {1}
            assert from_bytes(assigns[0].manifest) == manifest
            slices = [experts_of(assign) for assign in assigns]
            assert set.union(*slices) == all_experts(manifest)
            assert sum(map(len, slices)) == len(all_experts(manifest))
            # Nobody is told to go by the plan before all hold their slices.
            await nodes[0].say(ready=pb.SliceReady(epoch=1))
            await nodes[1].say(progress=pb.SliceProgress(epoch=1, bytes_done=30, bytes_total=100))
            await harness.until(lambda: harness.membership.state.nodes["b"].bytes_done == 30)
            await harness.until(lambda: 1 in harness.membership.state.nodes["a"].ready)
            assert not harness.membership.state.ready
            assert "b 30 %" in harness.membership.reason()
            await nodes[1].say(ready=pb.SliceReady(epoch=1))
            await nodes[2].say(ready=pb.SliceReady(epoch=1))
            for node in nodes:
                assert (await node.hear()).commit.epoch == 1
            assert harness.membership.state.ready
            assert harness.membership.reason() is None
            await harness.membership.wait_ready(1.0)

    asyncio.run(main())


def test_a_node_that_is_cut_off_keeps_its_place(cluster):
    async def main():
        async with cluster(min_nodes=2) as harness:
            await harness.join_obedient("a")
            b = await harness.join("b")
            await b.attend()
            first = await b.hear_assign()
            await b.say(ready=pb.SliceReady(epoch=1))
            await harness.membership.wait_ready(10.0)
            b.call.cancel()  # as when the machine loses its power
            await harness.until(lambda: not harness.membership.state.ready)
            assert harness.membership.state.phase("b") is Phase.AWAY
            assert "Expert node b is away" in harness.membership.reason()
            assert harness.membership.reason().endswith("Requests are slow meanwhile, or wait.")
            await b.attend()
            again = await b.hear_assign()
            assert (again.epoch, experts_of(again)) == (1, experts_of(first))
            await b.say(ready=pb.SliceReady(epoch=1))
            assert (await b.hear()).commit.epoch == 1
            assert harness.membership.state.ready

    asyncio.run(main())


def test_a_second_stream_of_a_node_replaces_the_first(cluster, hand_node):
    async def main():
        async with cluster() as harness:
            first = await harness.join("a")
            await first.attend()
            await first.hear_assign()
            second = hand_node("a", first.identity, harness.cluster_address)
            harness.nodes.append(second)
            await second.attend(address="127.0.0.1:8")
            assert (await second.hear_assign()).epoch == 1
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await first.hear()
            assert caught.value.code() == grpc.StatusCode.ABORTED
            assert "another control stream" in caught.value.details()
            node = harness.membership.state.nodes["a"]
            assert node.present
            assert node.capacity.address == "127.0.0.1:8"

    asyncio.run(main())


def test_a_new_node_gets_its_share_while_the_old_plan_serves(cluster):
    async def main():
        async with cluster(min_nodes=1) as harness:
            a = await harness.join("a")
            await a.attend()
            await a.hear_assign()
            await a.say(ready=pb.SliceReady(epoch=1))
            assert (await a.hear()).commit.epoch == 1
            b = await harness.join("b")
            await b.attend()
            ours, theirs = await a.hear_assign(), await b.hear_assign()
            assert ours.epoch == theirs.epoch == 2
            assert len(experts_of(ours)) == len(experts_of(theirs)) == 7
            await a.say(ready=pb.SliceReady(epoch=2))
            await harness.until(lambda: 2 in harness.membership.state.nodes["a"].ready)
            assert harness.membership.state.active.epoch == 1
            assert harness.membership.state.ready
            await b.say(ready=pb.SliceReady(epoch=2))
            assert (await b.hear()).commit.epoch == 2
            assert (await a.hear()).commit.epoch == 2
            assert harness.membership.state.active.epoch == 2

    asyncio.run(main())


def test_a_node_that_comes_while_a_plan_is_loaded_waits_for_it(cluster):
    async def main():
        async with cluster(min_nodes=1) as harness:
            a = await harness.join("a")
            await a.attend()
            assert (await a.hear_assign()).epoch == 1
            await harness.join_obedient("b")
            await harness.until(lambda: "b" in harness.membership.state.nodes)
            assert harness.membership.state.epoch == 1
            await a.say(ready=pb.SliceReady(epoch=1))
            harness.obey(a)
            await harness.until(lambda: harness.membership.state.active_owners == {"a", "b"})

    asyncio.run(main())


def test_a_leaving_node_is_released_when_the_others_hold_its_experts(cluster, manifest):
    async def main():
        async with cluster(min_nodes=2) as harness:
            a, b = await harness.join("a"), await harness.join_obedient("b")
            await a.attend()
            await a.hear_assign()
            await a.say(ready=pb.SliceReady(epoch=1))
            assert (await a.hear()).commit.epoch == 1
            await a.say(leaving=pb.Leaving())
            assert (await a.hear()).WhichOneof("directive") == "release"
            state = harness.membership.state
            assert state.active.epoch == 2
            assert state.active_owners == {b.name}
            assert state.phase("a") is Phase.LEAVING
            a.call.cancel()
            await harness.until(lambda: "a" not in harness.membership.state.nodes)
            assert harness.membership.state.ready

    asyncio.run(main())


def test_a_leaving_node_is_released_at_once_when_the_others_have_no_room(cluster, manifest):
    async def main():
        async with cluster(min_nodes=2) as harness:
            room = manifest.total_bytes * 2 // 3
            a = await harness.join("a")
            await harness.join_obedient("b", ram_bytes=room)
            await a.attend(ram_bytes=room)
            await a.hear_assign()
            await a.say(ready=pb.SliceReady(epoch=1))
            assert (await a.hear()).commit.epoch == 1
            await a.say(leaving=pb.Leaving())
            assert (await a.hear()).WhichOneof("directive") == "release"
            assert harness.membership.state.active.epoch == 1
            a.call.cancel()
            await harness.until(lambda: harness.membership.state.phase("a") is Phase.AWAY)
            # It comes back as after a restart of its service.
            await a.attend(ram_bytes=room)
            assert (await a.hear_assign()).epoch == 1
            await a.say(ready=pb.SliceReady(epoch=1))
            await harness.membership.wait_ready(10.0)

    asyncio.run(main())


def test_a_node_that_leaves_before_any_plan_runs_is_released_at_once(cluster):
    async def main():
        async with cluster(min_nodes=2) as harness:
            a = await harness.join("a")
            await a.attend()
            await a.say(leaving=pb.Leaving())
            assert (await a.hear()).WhichOneof("directive") == "release"

    asyncio.run(main())


def test_drain_moves_the_experts_or_says_why_not(cluster, manifest):
    async def main():
        async with cluster(min_nodes=2) as harness:
            a = await harness.join_obedient("a", ram_bytes=manifest.total_bytes // 2)
            b = await harness.join_obedient("b", ram_bytes=manifest.total_bytes)
            await harness.membership.wait_ready(10.0)
            refusal = await b.stub.Drain(pb.DrainRequest(node_name="b"), metadata=metadata())
            assert not refusal.released
            assert "is missing" in refusal.sentence
            assert harness.membership.state.phase("b") is Phase.READY
            reply = await a.stub.Drain(pb.DrainRequest(node_name="a"), metadata=metadata())
            assert reply.released
            assert harness.membership.state.active_owners == {"b"}
            assert harness.membership.state.ready
            with pytest.raises(CoordinatorError, match="no node named 'ghost'"):
                await harness.membership.release("ghost")

    asyncio.run(main())


def test_a_node_that_is_away_for_good_can_be_drained(cluster):
    async def main():
        async with cluster(min_nodes=2) as harness:
            a = await harness.join_obedient("a")
            await harness.join_obedient("b")
            await harness.membership.wait_ready(10.0)
            a.call.cancel()
            await harness.until(lambda: not harness.membership.state.ready)
            await harness.membership.release("a")
            assert harness.membership.state.ready
            assert "a" not in harness.membership.state.nodes

    asyncio.run(main())


def test_a_node_may_drain_only_itself(cluster):
    async def main():
        async with cluster() as harness:
            await harness.join_obedient("a")
            b = await harness.join("b")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await b.stub.Drain(pb.DrainRequest(node_name="a"), metadata=metadata())
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED

    asyncio.run(main())


def test_a_silent_node_is_away_and_told_so(cluster, monkeypatch):
    async def main():
        async with cluster() as harness:
            node = await harness.join("a")
            await node.attend()
            await node.hear_assign()
            await node.say(ready=pb.SliceReady(epoch=1))
            await harness.membership.wait_ready(10.0)
            monkeypatch.setattr(membership, "SILENCE_SECONDS", 0.1)
            await harness.until(lambda: harness.membership.state.phase("a") is Phase.AWAY)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await node.hear():
                    pass
            assert caught.value.code() == grpc.StatusCode.ABORTED
            assert "sent no report" in caught.value.details()

    asyncio.run(main())


def test_a_slice_that_could_not_be_loaded_is_said_and_assigned_again(cluster, monkeypatch):
    async def main():
        monkeypatch.setattr(membership, "RETRY_SECONDS", 0.05)
        async with cluster() as harness:
            node = await harness.join("a")
            await node.attend()
            await node.hear_assign()
            await node.say(failed=pb.SliceFailed(epoch=1, sentence="The disk of attic is full."))
            await harness.until(lambda: bool(harness.membership.state.nodes["a"].problem))
            assert "a: The disk of attic is full." in harness.membership.reason()
            assert (await node.hear_assign()).epoch == 1
            await node.say(ready=pb.SliceReady(epoch=1))
            await harness.membership.wait_ready(10.0)

    asyncio.run(main())


def test_too_little_memory_is_said_and_healed_by_another_node(cluster, manifest):
    async def main():
        async with cluster(min_nodes=1) as harness:
            half = manifest.total_bytes * 2 // 3
            await harness.join_obedient("a", ram_bytes=half)
            with pytest.raises(CoordinatorError, match=r"not ready after 0 s\. The machine gives .* is missing"):
                await harness.membership.wait_ready(0.3)
            await harness.join_obedient("b", ram_bytes=half)
            await harness.membership.wait_ready(10.0)

    asyncio.run(main())


def test_the_coordinators_own_memory_is_a_node(cluster, manifest):
    async def main():
        async with cluster(min_nodes=1, local_bytes=manifest.total_bytes) as harness:
            await harness.join_obedient("a", ram_bytes=manifest.total_bytes)
            await harness.until(lambda: 1 in harness.membership.state.nodes[LOCAL].assigned)
            await harness.until(lambda: 1 in harness.membership.state.nodes["a"].ready)
            assert not harness.membership.state.ready
            harness.membership.local_ready(1)
            assert harness.membership.state.ready
            assert harness.membership.state.active_owners == {"a", LOCAL}

    asyncio.run(main())


def test_a_restarted_coordinator_takes_up_its_plan(cluster):
    async def main():
        async with cluster(min_nodes=2) as harness:
            a = await harness.join_obedient("a")
            b = await harness.join_obedient("b")
            await harness.membership.wait_ready(10.0)
            plan = harness.membership.state.active
            identities = [(node.name, node.identity) for node in (a, b)]
            port = harness.server.cluster_port
        async with cluster(min_nodes=2, cluster_port=port) as harness:
            assert "Expert nodes a, b are away" in harness.membership.reason()
            for name, identity in identities:
                node = type(a)(name, identity, harness.cluster_address)
                harness.nodes.append(node)
                await node.attend()
                harness.obey(node)
            await harness.membership.wait_ready(10.0)
            assert harness.membership.state.active == plan
            # The next plan's epoch is new even so.
            await harness.join_obedient("c")
            await harness.until(lambda: harness.membership.state.active_owners == {"a", "b", "c"})
            assert harness.membership.state.active.epoch == plan.epoch + 1
            heard = plan.epoch + 1
        other = Manifest("other", "cd" * 32, harness.membership.manifest.layers)
        async with cluster(min_nodes=1, manifest=other) as harness:
            await harness.join_obedient("d")
            await harness.membership.wait_ready(10.0)
            assert harness.membership.state.active.epoch == heard + 1

    asyncio.run(main())


def test_a_node_that_comes_back_with_less_memory_causes_a_new_plan(cluster, manifest):
    async def main():
        async with cluster(min_nodes=2) as harness:
            a = await harness.join_obedient("a", ram_bytes=manifest.total_bytes)
            await harness.join_obedient("b", ram_bytes=manifest.total_bytes)
            await harness.membership.wait_ready(10.0)
            a.call.cancel()
            await harness.until(lambda: not harness.membership.state.ready)
            small = manifest.total_bytes // 10
            await a.attend(ram_bytes=small)
            harness.obey(a)
            await harness.until(lambda: harness.membership.state.active.epoch == 2)
            state = harness.membership.state
            held = sum(manifest.layers[at].spec.nbytes * len(x) for at, x in enumerate(state.active.slice_of("a")))
            assert held <= small

    asyncio.run(main())


def test_a_node_that_listens_everywhere_is_reached_where_it_calls_from(cluster):
    async def main():
        async with cluster() as harness:
            node = await harness.join("a")
            await node.attend(address="0.0.0.0:4711")
            await node.hear_assign()
            assert harness.membership.state.nodes["a"].capacity.address == "127.0.0.1:4711"

    asyncio.run(main())


def test_each_change_is_told_in_order(cluster):
    async def main():
        async with cluster() as harness:
            await harness.join_obedient("a")
            await harness.membership.wait_ready(10.0)
            assert harness.states[-1] is harness.membership.state
            epochs = [state.epoch for state in harness.states]
            assert epochs == sorted(epochs)
            assert [state.ready for state in harness.states].index(True) > 0

    asyncio.run(main())


def test_a_revoked_nodes_open_stream_is_ended(cluster):
    async def main():
        async with cluster() as harness:
            node = await harness.join("a")
            await node.attend()
            await node.hear_assign()
            revoke_node(harness.store, "a")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await node.hear():
                    pass
            assert "was shut out of this cluster" in caught.value.details()
            assert harness.membership.state.phase("a") is Phase.AWAY

    asyncio.run(main())


def test_a_quarantined_node_is_told_so_and_comes_back_when_it_is_readmitted(cluster):
    async def main():
        async with cluster(min_nodes=2) as harness:
            a = await harness.join_obedient("a")
            b = await harness.join_obedient("b")
            await harness.membership.wait_ready(10.0)
            harness.membership.quarantine("a", "Node a answered values that are not numbers.")
            assert harness.membership.state.phase("a") is Phase.QUARANTINED
            await harness.until(lambda: harness.membership.state.active_owners == {b.name})  # at once
            await a.attend()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await a.hear()
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert "`moehive node readmit a`" in caught.value.details()
            readmit_node(harness.store, "a")
            with pytest.raises(CoordinatorError, match="No node named 'a' is quarantined or drained"):
                readmit_node(harness.store, "a")
            await harness.until(lambda: "a" not in harness.membership.state.nodes)
            await a.attend()
            harness.obey(a)
            await harness.until(lambda: harness.membership.state.active_owners == {"a", "b"})

    asyncio.run(main())


def test_a_better_plan_is_loaded_while_the_old_one_serves(cluster, manifest):
    async def main():
        async with cluster(min_nodes=2) as harness:
            await harness.join_obedient("a")
            await harness.join_obedient("b")
            await harness.until(lambda: harness.membership.state.ready)
            first = harness.membership.state.active
            wanted = tuple(tuple(("b", "a") for _ in layer) for layer in first.owners)

            await harness.membership.planner.improve(lambda capacities, epoch, current: None)
            assert harness.membership.state.active is first and harness.membership.state.pending is None
            await harness.membership.planner.improve(
                lambda capacities, epoch, current: (
                    Plan(epoch, wanted) if current is first and set(capacities) == {"a", "b"} else None
                )
            )
            await harness.until(lambda: harness.membership.state.active is not first)
            plan = harness.membership.state.active
            assert plan.owners == wanted and plan.epoch > first.epoch
            assert harness.membership.state.ready and harness.membership.state.members == {"a", "b"}

    asyncio.run(main())


def test_a_drained_node_holds_nothing_over_restarts_until_it_is_readmitted(cluster, manifest):
    async def main():
        async with cluster(min_nodes=2) as harness:
            a, b = await harness.join("a"), await harness.join_obedient("b")
            await a.attend()
            await a.hear_assign()
            await a.say(ready=pb.SliceReady(epoch=1))
            assert (await a.hear()).commit.epoch == 1
            ask_drain(harness.store, "a")
            empty = await a.hear_assign()
            assert empty.epoch == 2 and not experts_of(empty)
            assert harness.membership.state.ready
            await a.say(ready=pb.SliceReady(epoch=2))
            assert (await a.hear()).commit.epoch == 2  # now it may drop all that it had
            assert harness.membership.state.active_owners == {b.name}
            assert harness.membership.state.phase("a") is Phase.DRAINED
            identities = [(node.name, node.identity) for node in (a, b)]
            port = harness.server.cluster_port
        async with cluster(min_nodes=2, cluster_port=port) as harness:
            for name, identity in identities:
                node = type(a)(name, identity, harness.cluster_address)
                harness.nodes.append(node)
                await node.attend()
                harness.obey(node)
            await harness.until(lambda: harness.membership.state.phase("a") is Phase.DRAINED)
            await harness.membership.wait_ready(10.0)
            assert harness.membership.state.active_owners == {"b"}
            readmit_node(harness.store, "a")
            await harness.until(lambda: harness.membership.state.active_owners == {"a", "b"})
            assert harness.membership.state.phase("a") is Phase.READY

    asyncio.run(main())


def test_a_drain_is_refused_in_words_when_the_others_have_no_room(cluster, manifest):
    async def main():
        async with cluster(min_nodes=2) as harness:
            await harness.join_obedient("a", ram_bytes=manifest.total_bytes)
            await harness.join_obedient("b", ram_bytes=manifest.total_bytes // 2)
            await harness.membership.wait_ready(10.0)
            ask_drain(harness.store, "a")
            async with asyncio.timeout(10):
                while not (asked := drains(harness.store)["a"]).refusal:  # noqa: ASYNC110 - nothing tells of it
                    await asyncio.sleep(0.01)
            assert not asked.accepted
            assert asked.refusal.startswith("Node a keeps its experts, for the others can't: The machine gives ")
            state = harness.membership.state
            assert state.epoch == 1 and state.phase("a") is Phase.READY and state.active_owners == {"a", "b"}
            with pytest.raises(CoordinatorError, match="No node named 'coordinator' has joined"):
                ask_drain(harness.store, LOCAL)

    asyncio.run(main())
