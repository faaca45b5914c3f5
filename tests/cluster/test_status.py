"""What `moehive status` says of a cluster whose node has more experts than memory, while they are fetched ahead."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from moehive.client import Status
from moehive.coordinator.cli.main import app

MEMORY = 1 << 20


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


def test_tiers_and_cache_aware_routing_are_shown(
    new_cluster: Callable[..., Any], model: Path, ask: Callable[..., Any]
) -> None:
    def show(address: str, *options: str) -> str:
        result = CliRunner().invoke(app, ["status", "--address", address, *options])
        assert result.exit_code == 0, result.output
        return " ".join(result.stdout.split())  # lines end where a terminal does

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
            assert tiers.ram_bytes <= MEMORY < tiers.disk_bytes == 48 * 64 * 64 * 3 * 4
            assert 0 < tiers.hit_rate < 1 and 0 <= tiers.foreseen_rate <= tiers.hit_rate
            address = f"127.0.0.1:{coordinator.grpc_port}"
            words = await asyncio.to_thread(show, address)
            assert "node-0: 2.4 MB of experts on disk, " in words and " in memory, 0 B on a GPU; " in words
            assert "of those asked for were in memory, " in words and "thanks to a prefetch" in words
            assert "Cache-aware routing is on, margin 0.25: it changes the model's answers." in words
            row = json.loads(await asyncio.to_thread(show, address, "--json"))
            assert row["cache_margin"] == 0.25 and 0 < row["nodes"][0]["tiers"]["hit_rate"] < 1

    asyncio.run(run())
