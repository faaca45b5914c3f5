"""Random checkpoints of many families over three node processes: transformers' own tokens and log-probabilities."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

FAMILIES = [
    "qwen3_moe", "qwen3_5_moe_text", "qwen3_next", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss",
    "granitemoe", "ernie4_5_moe", "minimax_m2", "jamba", "nemotron_h", "qwen2_moe",
]  # fmt: skip
PROMPT = [3, 17, 5, 99, 42, 8, 61, 7, 30]
STEPS = 12
TOLERANCE = 1e-4  # nats


def reference(folder: Path) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities by transformers on one process, without any cache."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except ValueError:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids, logprobs = list(PROMPT), []
    with torch.no_grad():
        for _ in range(STEPS):
            scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores[ids[-1]]))
    return ids[len(PROMPT) :], logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_are_those_of_one_process(
    family: str, cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any]
) -> None:
    folder = checkpoint(family)
    tokens, logprobs = reference(folder)

    async def run() -> Any:
        async with cluster.coordinator(folder, nodes=3) as coordinator:
            return await ask(
                coordinator,
                lambda client: client.generate(token_ids=PROMPT, max_tokens=STEPS, temperature=0, logprobs=1),
            )

    answer = asyncio.run(run())
    assert answer.token_ids == tokens[: len(answer.token_ids)]
    ended = len(answer.token_ids) < STEPS
    assert not ended or answer.finish_reason == "stop"  # the checkpoint's end-of-text token
    assert answer.logprobs == pytest.approx(logprobs[: len(answer.logprobs)], abs=TOLERANCE)
    assert len(answer.logprobs) == len(answer.token_ids) > 0
