"""What `moehive status` says of a node that has more experts than memory, and of one that serves and loads."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from moehive.client import Status
from moehive.coordinator.checkpoints.slices import SliceSource
from moehive.coordinator.cli.main import app
from moehive.expert_node import agent
from moehive.proto.chunks import Message

MEMORY = 1 << 20
EXPERT_BYTES = 64 * 64 * 3 * 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """48 experts of 49 kB, more than twice MEMORY."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=3,
        num_experts=16, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=512,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def show(address: str, *options: str) -> str:
    result = CliRunner().invoke(app, ["status", "--address", address, *options])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())  # lines end where a terminal does


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)


class Gate:
    """Lets `messages` of each stream of the coordinator's experts through."""

    def __init__(self) -> None:
        self.messages = 0
        self._changed = asyncio.Condition()

    async def open_to(self, messages: int) -> None:
        async with self._changed:
            self.messages = messages
            self._changed.notify_all()

    async def pass_on(self, stream: AsyncGenerator[Message]) -> AsyncGenerator[Message]:
        passed = 0
        async for message in stream:
            async with self._changed:
                while passed == self.messages:
                    await self._changed.wait()
            passed += 1
            yield message


def test_a_node_that_serves_and_loads_says_how_far_it_is(
    new_cluster: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said of cache-aware routing, which is off by default."""
    monkeypatch.setattr(agent, "HEARTBEAT_SECONDS", 0.05)
    made = new_cluster()

    async def run() -> None:
        async with (
            made.coordinator_alone(model, min_nodes=2) as coordinator,
            made.node_here("stays"),
            made.node_here("leaves") as other,
        ):
            await coordinator.wait_ready(60)
            gate, stream = Gate(), SliceSource.stream
            monkeypatch.setattr(SliceSource, "stream", lambda self, request: gate.pass_on(stream(self, request)))
            sources = coordinator._server.sources
            monkeypatch.setattr(sources, "locate", lambda asker, experts, avoid: [None] * len(experts))

            def seen() -> Any:
                return next(node for node in coordinator.status().nodes if node.name == "stays")

            assert (seen().state, seen().load_total_bytes) == ("ready", 0)
            leaving = asyncio.create_task(other.agent.leave())
            await gate.open_to(2)
            await until(lambda: seen().load_bytes == (24 + 2) * EXPERT_BYTES)  # half of them were there
            await gate.open_to(5)
            await until(lambda: seen().load_bytes == (24 + 5) * EXPERT_BYTES and seen().load_bytes_per_s > 0)
            assert coordinator.status().ready and seen().state == "ready"
            assert seen().load_total_bytes == 48 * EXPERT_BYTES
            address = f"127.0.0.1:{coordinator.grpc_port}"
            words = await asyncio.to_thread(show, address)
            assert re.search(r"stays has loaded [\d.]+ MB of [\d.]+ MB, [\d,]+ MB/s, \d+ s left\.", words), words
            assert "leaves has loaded" not in words
            await gate.open_to(1000)
            await until(lambda: not seen().load_total_bytes)
            leaving.cancel()
            words = await asyncio.to_thread(show, address)
            assert "has loaded" not in words
            assert coordinator.status().cache_margin == 0 and "outing" not in words
            assert json.loads(await asyncio.to_thread(show, address, "--json"))["cache_margin"] == 0

    asyncio.run(run())


def test_tiers_and_cache_aware_routing_are_shown(
    new_cluster: Callable[..., Any], model: Path, ask: Callable[..., Any]
) -> None:
    async def run() -> None:
        async with new_cluster("1MiB").coordinator(model, nodes=1, cache_margin=0.25) as coordinator:
            prompt, tokens = [3, 17, 5, 99, 42], 40
            await ask(coordinator, lambda client: client.generate(token_ids=prompt, max_tokens=tokens))

            def seen() -> Status:
                """What the node says once a heartbeat has told of the answer."""
                return ask(coordinator, lambda client: client.status())

            async with asyncio.timeout(60):
                while (tiers := (status := await seen()).nodes[0].tiers) is None or not tiers.disk_read_bytes:
                    pass
            assert status.cache_margin == 0.25
            assert tiers.ram_bytes <= MEMORY < tiers.disk_bytes == 48 * EXPERT_BYTES
            assert 0 < tiers.hit_rate < 1 and 0 <= tiers.foreseen_rate <= tiers.hit_rate
            address = f"127.0.0.1:{coordinator.grpc_port}"
            words = await asyncio.to_thread(show, address)
            assert "node-0: 2.4 MB of experts on disk, " in words and " in memory, 0 B on a GPU; " in words
            assert "of those asked for were in memory, " in words and "thanks to a prefetch" in words
            assert "Cache-aware routing is on, margin 0.25: it changes the model's answers." in words
            row = json.loads(await asyncio.to_thread(show, address, "--json"))
            assert row["cache_margin"] == 0.25 and 0 < row["nodes"][0]["tiers"]["hit_rate"] < 1

    asyncio.run(run())
