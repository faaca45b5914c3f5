"""Machines that go away in the middle of a request and come back: the text is that of a calm run."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moehive.client import Client
from moehive.coordinator.app import Coordinator

PROMPT = [3, 17, 5, 99, 42]
TOKENS = 200


async def interrupted(coordinator: Coordinator, act: Callable[[], None]) -> list[int]:
    """Starts a long generation, calls `act` once tokens flow, and returns all of its tokens."""
    flowing = asyncio.Event()
    loop = asyncio.get_running_loop()
    tokens: list[int] = []

    def read() -> None:
        with Client(f"127.0.0.1:{coordinator.grpc_port}") as client:
            for piece in client.stream(token_ids=PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True):
                tokens.extend(piece.token_ids)
                if len(tokens) > 5:
                    loop.call_soon_threadsafe(flowing.set)

    reading = asyncio.create_task(asyncio.to_thread(read))
    await asyncio.wait_for(flowing.wait(), 60)
    act()
    await asyncio.wait_for(reading, 100)
    return tokens


def calm(client: Client) -> list[int]:
    return list(client.generate(token_ids=PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True).token_ids)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_that_dies_or_hangs_is_done_without(
    how: signal.Signals, cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any]
) -> None:
    async def run() -> tuple[Any, Any, Any]:
        async with cluster.coordinator(checkpoint("qwen3_moe"), nodes=3, deterministic=True) as coordinator:
            before = await ask(coordinator, calm)
            node = cluster.nodes["node-1"]
            meanwhile = await interrupted(coordinator, lambda: node.process.send_signal(how))
            if how == signal.SIGKILL:
                node.process.wait(30)
                cluster.start_node("node-1")
            else:
                node.process.send_signal(signal.SIGCONT)
            await coordinator.wait_ready(60)
            return before, meanwhile, await ask(coordinator, calm)

    before, meanwhile, after = asyncio.run(run())
    assert len(before) == TOKENS
    assert meanwhile == before
    assert after == before


def test_requests_are_answered_while_all_nodes_are_away(
    cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any]
) -> None:
    async def run() -> tuple[Any, Any, Any]:
        async with cluster.coordinator(checkpoint("qwen3_moe"), nodes=3, deterministic=True) as coordinator:
            before = await ask(coordinator, calm)
            for node in cluster.nodes.values():
                node.process.send_signal(signal.SIGKILL)
            alone = await ask(coordinator, calm)
            status = coordinator.status()
            for name in list(cluster.nodes):
                cluster.nodes[name].process.wait(30)
                cluster.start_node(name)
            await coordinator.wait_ready(60)
            assert (await ask(coordinator, calm)) == before
            return before, alone, status

    before, alone, status = asyncio.run(run())
    assert alone == before
    assert not status.ready and "node-0, node-1, node-2 are away" in status.reason


def test_nodes_come_back_to_a_coordinator_that_starts_again(
    cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any]
) -> None:
    folder = checkpoint("qwen3_moe")

    async def run() -> tuple[Any, Any]:
        async with cluster.coordinator(folder, nodes=3) as coordinator:
            answer = await ask(coordinator, lambda c: c.generate(token_ids=PROMPT, max_tokens=20, temperature=0))
            held = {n.name: n.experts_held for n in coordinator.status().nodes}
            return answer.token_ids, held

    first = asyncio.run(run())
    pids = {name: node.process.pid for name, node in cluster.nodes.items()}
    fetches = sum(node.log.count("Fetching") for node in cluster.nodes.values())
    assert asyncio.run(run())[0] == first[0]
    assert pids == {name: node.process.pid for name, node in cluster.nodes.items()}
    assert fetches == sum(node.log.count("Fetching") for node in cluster.nodes.values())


def test_a_node_that_is_stopped_leaves_and_its_experts_move(
    cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any]
) -> None:
    async def run() -> tuple[Any, Any, int, set[str]]:
        async with cluster.coordinator(checkpoint("qwen3_moe"), nodes=3) as coordinator:

            def generate(client: Client) -> Any:
                return client.generate(token_ids=PROMPT, max_tokens=20, temperature=0).token_ids

            before = await ask(coordinator, generate)
            code = await asyncio.to_thread(cluster.nodes["node-2"].end, signal.SIGTERM)
            await coordinator.wait_ready(60)
            owners = {node.name for node in coordinator.status().nodes if node.experts_assigned}
            after = await ask(coordinator, generate)
            cluster.start_node("node-2")
            return before, after, code, owners

    before, after, code, owners = asyncio.run(run())
    assert code == 0 and owners == {"node-0", "node-1"} and before == after
