"""Nodes that join, leave, die or are shut out while a text is being made: the text is that of a calm run."""

import asyncio
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from moehive.client import Client
from moehive.coordinator import app
from moehive.coordinator.app import Coordinator
from moehive.coordinator.cli.cluster import drain, readmit
from moehive.coordinator.cluster.membership import Membership
from moehive.coordinator.types import NodeName, Plan
from moehive.kernels.geometry import LayerGeometry

PROMPT = [3, 17, 5, 99, 42]
TOKENS = 300


def stream(coordinator: Coordinator, tokens: list[int], changed: threading.Event | None = None) -> None:
    """Reads a text; slowly until `changed`, so that the text is being made as long as the change lasts."""
    with Client(f"127.0.0.1:{coordinator.grpc_port}") as client:
        for piece in client.stream(token_ids=PROMPT, max_tokens=TOKENS, temperature=0.8, seed=3, ignore_eos=True):
            tokens += piece.token_ids
            if changed is not None:
                changed.wait(0.1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(90):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.02)


async def text_through(coordinator: Coordinator, change: Callable[[list[int]], Any]) -> list[int]:
    """The tokens of a text during which `change`, given those that have come so far, happens from begin to end."""
    tokens: list[int] = []
    changed = threading.Event()
    reading = asyncio.create_task(asyncio.to_thread(stream, coordinator, tokens, changed))
    await until(lambda: len(tokens) > 5)
    try:
        await change(tokens)
    finally:
        changed.set()
    await asyncio.wait_for(reading, 100)
    return tokens


def two_holders(
    capacities: Mapping[NodeName, int], layers: Sequence[LayerGeometry], epoch: int, previous: Plan | None = None
) -> Plan:
    names = sorted(capacities)
    many = len(names)
    return Plan(
        epoch,
        tuple(
            tuple((names[e % many], names[(e + 1) % many])[: max(1, min(2, many))] for e in range(layer.experts))
            for layer in layers
        ),
    )


def test_a_text_goes_on_through_a_join_and_a_drain(
    new_cluster: Callable[[], Any], checkpoint: Callable[[str], Path]
) -> None:
    made = new_cluster()

    async def run() -> tuple[list[int], list[int], list[set[str]]]:
        async with made.coordinator(checkpoint("qwen3_moe"), nodes=2, deterministic=True) as coordinator:
            calm: list[int] = []
            await asyncio.to_thread(stream, coordinator, calm)
            owners: list[set[str]] = []

            def names() -> set[str]:
                return {str(name) for name in coordinator.plan.slices} if coordinator.plan is not None else set()

            async def change(tokens: list[int]) -> None:
                made.start_node("node-2")
                await until(lambda: "node-2" in names())
                owners.append(names())
                await asyncio.to_thread(made.nodes["node-0"].end, signal.SIGTERM)
                await until(lambda: "node-0" not in names())
                owners.append(names())

            return calm, await text_through(coordinator, change), owners

    calm, meanwhile, owners = asyncio.run(run())
    assert owners == [{"node-0", "node-1", "node-2"}, {"node-1", "node-2"}]
    assert len(calm) == TOKENS and meanwhile == calm


def test_a_text_goes_on_while_a_node_is_drained_by_command_and_readmitted(
    new_cluster: Callable[[], Any], checkpoint: Callable[[str], Path]
) -> None:
    made = new_cluster()

    async def run() -> tuple[list[int], list[int]]:
        async with made.coordinator(checkpoint("qwen3_moe"), nodes=3, deterministic=True) as coordinator:

            def node(name: str) -> Any:
                return next(node for node in coordinator.status().nodes if node.name == name)

            calm: list[int] = []
            await asyncio.to_thread(stream, coordinator, calm)
            assert node("node-1").experts_held and not node("node-1").state.startswith("drain")

            async def change(tokens: list[int]) -> None:
                await asyncio.to_thread(drain, "node-1", made.state)
                assert node("node-1").state in ("draining", "drained")
                await until(lambda: node("node-1").state == "drained")
                assert coordinator.plan is not None and set(coordinator.plan.slices) == {"node-0", "node-2"}
                assert node("node-1").experts_held == node("node-1").bytes_held == 0
                assert coordinator.status().ready
                await asyncio.to_thread(readmit, "node-1", made.state)
                await until(lambda: coordinator.plan is not None and "node-1" in coordinator.plan.slices)

            return calm, await text_through(coordinator, change)

    calm, meanwhile = asyncio.run(run())
    assert len(calm) == TOKENS and meanwhile == calm


def test_replicas_take_over_and_nothing_is_read_from_the_checkpoint(
    new_cluster: Callable[[], Any], checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def membership(*arguments: Any, **options: Any) -> Membership:
        return Membership(*arguments, **(options | {"place": two_holders}))

    monkeypatch.setattr(app, "Membership", membership)
    made = new_cluster()

    async def run() -> tuple[list[int], list[int], bool]:
        async with made.coordinator(checkpoint("qwen3_moe"), nodes=3, deterministic=True) as coordinator:
            calm: list[int] = []
            await asyncio.to_thread(stream, coordinator, calm)
            ready = []

            async def change(tokens: list[int]) -> None:
                made.nodes["node-1"].end(signal.SIGKILL)
                await until(lambda: {n.name: n.state for n in coordinator.status().nodes}["node-1"] == "away")
                ready.append(coordinator.status().ready)

            meanwhile = await text_through(coordinator, change)
            fallback = coordinator.fallback
            assert fallback is not None and fallback.bytes_read == 0
            return calm, meanwhile, ready[0]

    calm, meanwhile, ready = asyncio.run(run())
    assert meanwhile == calm and ready


def test_a_node_that_lied_is_named_and_comes_back_only_by_command(
    new_cluster: Callable[[], Any], checkpoint: Callable[[str], Path]
) -> None:
    made = new_cluster()

    def states(coordinator: Coordinator) -> dict[str, str]:
        return {node.name: node.state for node in coordinator.status().nodes}

    async def run() -> None:
        async with made.coordinator(checkpoint("qwen3_moe"), nodes=2, deterministic=True) as coordinator:
            calm: list[int] = []
            await asyncio.to_thread(stream, coordinator, calm)

            async def change(tokens: list[int]) -> None:
                coordinator._quarantine(NodeName("node-1"), "Node node-1 answered values that are not numbers.")
                assert states(coordinator)["node-1"] == "quarantined"
                problems = {node.name: node.problem for node in coordinator.status().nodes if node.problem}
                assert problems == {"node-1": "Node node-1 answered values that are not numbers."}
                # The others take over at once: nobody waits for it to start again.
                await until(lambda: coordinator.plan is not None and set(coordinator.plan.slices) == {"node-0"})

            assert await text_through(coordinator, change) == calm
        # It stays so over a restart of both.
        made.nodes["node-1"].end(signal.SIGKILL)
        async with made.coordinator(checkpoint("qwen3_moe"), nodes=2, deterministic=True) as coordinator:
            await until(lambda: "readmit node-1" in made.nodes["node-1"].log)
            assert states(coordinator)["node-1"] == "quarantined"
            made.nodes["node-1"].end(signal.SIGKILL)
            await asyncio.to_thread(readmit, "node-1", made.state)
            made.start_node("node-1")
            await until(lambda: states(coordinator).get("node-1") == "ready")

    asyncio.run(run())
