"""The same request gives the same bits: twice, and on one node as on three; in f32 and in bf16."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

PROMPT = list(range(3, 60, 2))


def in_bf16(source: Path, target: Path) -> Path:
    """The checkpoint at `source` rounded to bf16."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    tensors = load_file(source / "model.safetensors")
    save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_node_and_three_give_the_same_bits(
    dtype: str, new_cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any], tmp_path: Path
) -> None:
    folder = checkpoint("qwen3_moe")
    if dtype == "bfloat16":
        folder = in_bf16(folder, tmp_path / "bf16")

    def calls(client: Any) -> list[tuple[list[int], list[float]]]:
        answers = [
            client.generate(token_ids=PROMPT, max_tokens=24, temperature=temperature, seed=7, logprobs=1)
            for temperature in (0, 1.0, 1.0)
        ]
        return [(answer.token_ids, answer.logprobs) for answer in answers]

    clusters = {nodes: new_cluster() for nodes in (1, 3)}

    async def run(nodes: int, deterministic: bool) -> Any:
        async with clusters[nodes].coordinator(folder, nodes=nodes, deterministic=deterministic) as coordinator:
            return await ask(coordinator, calls)

    three = asyncio.run(run(3, True))
    assert three[1] == three[2]  # the same seed
    assert asyncio.run(run(1, True)) == three
    # Partial sums are added node by node: the same text, and the same bits for the same placement.
    summed = asyncio.run(run(1, False))
    assert summed == asyncio.run(run(1, False))
    if dtype == "float32":
        assert [tokens for tokens, _ in summed] == [tokens for tokens, _ in three]


def test_experts_in_the_coordinators_own_memory_give_the_same_bits(
    new_cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any]
) -> None:
    folder = checkpoint("qwen3_moe")
    experts = (tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".experts." in name)
    # With room for all of them, whether a node gets any would be up to what the link was measured to take.
    half = sum(tensor.nbytes for tensor in experts) // 2

    async def run(local_bytes: int) -> tuple[Any, dict[str, int]]:
        # A cluster of its own for each: one that was there before goes on with the plan that it had, until a better
        # one was made and loaded, and an answer may be ready before that.
        made = new_cluster()
        async with made.coordinator(folder, nodes=1, deterministic=True, local_bytes=local_bytes) as coordinator:
            answer = await ask(
                coordinator, lambda c: c.generate(token_ids=PROMPT, max_tokens=16, temperature=0, logprobs=1)
            )
            calls = {node.name: node.expert_calls for node in coordinator.status().nodes}
            return (answer.token_ids, answer.logprobs), calls

    remote, _ = asyncio.run(run(0))
    shared, calls = asyncio.run(run(half))
    assert shared == remote
    assert calls["coordinator"] > 0 and calls["node-0"] > 0
