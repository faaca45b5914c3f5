"""A GGUF file over real node processes: the greedy tokens of transformers' own model of the same weights."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from by_path import load
from transformers import AutoModelForCausalLM

gguf_writer = load(Path(__file__).parents[1] / "coordinator" / "gguf_writer.py")
PROMPT = [3, 17, 5, 99, 42, 8, 61, 7, 30]
STEPS = 12
TOLERANCE = 1e-4  # nats


@torch.no_grad()
def test_greedy_tokens_of_a_file_are_those_of_transformers(
    cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), dtype=torch.float32).eval()
    gguf_writer.write(model, model.config, tmp_path / "tiny-mixtral.gguf")
    ids, logprobs = list(PROMPT), []
    for _ in range(STEPS):
        scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores[ids[-1]]))

    async def run() -> Any:
        async with cluster.coordinator(tmp_path / "tiny-mixtral.gguf", nodes=2) as coordinator:
            assert coordinator.model_name == "tiny-mixtral"
            return await ask(
                coordinator,
                lambda client: client.generate(token_ids=PROMPT, max_tokens=STEPS, temperature=0, logprobs=1),
            )

    answer = asyncio.run(run())
    assert list(answer.token_ids) == ids[len(PROMPT) :]
    for measured, expected in zip(answer.logprobs, logprobs, strict=True):
        assert abs(measured - expected) < TOLERANCE
