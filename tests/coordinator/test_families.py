"""Every family: checkpoint, trunk and experts give what transformers gives on the same checkpoint in one process."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_path import load

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.base import SequenceInput
from moehive.coordinator.models.generic import GenericTrunk, SequenceCache

_families = load(Path(__file__).with_name("families.py"))

PROMPT, STEPS, TOLERANCE = 12, 16, 1e-4


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1)


def reference(folder: Path, model_class: Any, prompt: torch.Tensor) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """transformers' greedy tokens, their logits [STEPS, vocab], and the prompt's logits [PROMPT, vocab]."""
    model = model_class.from_pretrained(folder, experts_implementation="eager").eval()
    with torch.no_grad():
        output = model.generate(
            prompt[None], max_new_tokens=STEPS, do_sample=False, eos_token_id=None, use_cache=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        whole = model(input_ids=prompt[None]).logits[0]
    return output.sequences[0, PROMPT:].tolist(), torch.cat(output.logits), whole


async def greedy(
    trunk: GenericTrunk, backend: Any, prompt: torch.Tensor, chunk: int
) -> tuple[list[int], torch.Tensor, SequenceCache]:
    cache = trunk.new_cache()
    for part in prompt.split(chunk):
        (logits,) = await trunk.forward([SequenceInput(part, cache)], backend)
    tokens: list[int] = []
    steps: list[torch.Tensor] = []
    for _ in range(STEPS):
        steps.append(logits)
        tokens.append(int(logits.argmax()))
        (logits,) = await trunk.forward([SequenceInput(torch.tensor(tokens[-1:]), cache)], backend)
    return tokens, torch.stack(steps), cache


def stored_bytes(value: Any) -> int:
    """Bytes of the storages of all tensors in a cache, wherever they hang."""
    storages: dict[int, int] = {}

    def visit(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, list | tuple):
            for element in item:
                visit(element)
        elif isinstance(item, dict):
            visit(list(item.values()))
        elif hasattr(item, "__dict__"):
            visit(list(vars(item).values()))

    visit(value)
    return sum(storages.values())


@pytest.mark.parametrize("family", _families.FAMILIES)
def test_family_equals_transformers(
    family: str,
    tiny_moe: Callable[[str], Path],
    reference_backend: Any,
    make_trunk: Callable[[Checkpoint], GenericTrunk],
) -> None:
    folder = tiny_moe(family)
    checkpoint = Checkpoint.open(folder)
    architecture = checkpoint.load_trunk()
    loaded = {
        id(tensor): tensor.nbytes
        for tensor in (*architecture.model.parameters(), *architecture.model.buffers())
        if tensor.device.type != "meta"
    }
    assert checkpoint.trunk_bytes == sum(loaded.values())

    prompt = torch.randint(3, _families.VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(1))
    tokens, steps, whole = reference(folder, type(architecture.model), prompt)
    trunk, backend = make_trunk(checkpoint), reference_backend(checkpoint)

    ours, ours_steps, cache = asyncio.run(greedy(trunk, backend, prompt, PROMPT))
    assert ours == tokens
    torch.testing.assert_close(logprobs(ours_steps), logprobs(steps), rtol=0, atol=TOLERANCE)
    batch = [SequenceInput(prompt, trunk.new_cache(), all_logits=True)]
    (every,) = asyncio.run(trunk.forward(batch, backend))
    torch.testing.assert_close(logprobs(every), logprobs(whole), rtol=0, atol=TOLERANCE)

    length = PROMPT + STEPS
    assert stored_bytes(cache.states) <= trunk.cache_bytes(length) <= 4 * stored_bytes(cache.states) + 65_536

    if trunk.prefill_chunk < trunk.context_length:  # the trunk says that a prompt may be split
        ours, ours_steps, _ = asyncio.run(greedy(trunk, backend, prompt, 5))
        assert ours == tokens
        torch.testing.assert_close(logprobs(ours_steps), logprobs(steps), rtol=0, atol=TOLERANCE)
