"""A pass of few tokens has the bits of the single operations that a pass of many is made of."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.base import ExpertBackend, SequenceInput
from moehive.coordinator.models.lean.batch import Batch
from moehive.coordinator.models.lean.mlp import DenseMlp
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk
from moehive.kernels.layer import DecoderLayer
from moehive.kernels.library import NativeLibraryError

FAMILIES = ("mixtral", "qwen3_moe", "glm4_moe", "gpt_oss", "qwen3_next", "qwen3_5_moe_text", "deepseek_v3")
CHUNKS = ((5, 27), (1, 1), (1, 30), (13, 1))  # of two sequences, pass by pass: at most 32 tokens together


def opened(folder: Path) -> tuple[Checkpoint, LeanTrunk]:
    checkpoint = Checkpoint.open(folder)
    trunk = load_trunk(checkpoint, 2)
    assert isinstance(trunk, LeanTrunk)
    return checkpoint, trunk


def run(trunk: LeanTrunk, experts: ExpertBackend, short: bool) -> list[torch.Tensor]:
    """Each pass's logits, of all tokens in every other pass."""
    forward = trunk._short.forward if short else trunk._forward
    caches = [trunk.new_cache() for _ in CHUNKS[0]]
    generator = torch.Generator().manual_seed(3)

    async def passes() -> list[torch.Tensor]:
        logits = []
        for number, counts in enumerate(CHUNKS):
            inputs = [
                SequenceInput(torch.randint(3, 128, (count,), generator=generator), cache, all_logits=number % 2 == 0)
                for count, cache in zip(counts, caches, strict=True)
            ]
            batch = Batch(inputs, trunk._parts.rope, trunk._ops)
            logits.append(await forward(batch, experts))
            batch.finish()
        return logits

    try:
        return asyncio.run(passes())
    finally:
        for cache in caches:
            trunk.free_cache(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_of_single_operations(
    family: str,
    dtype: torch.dtype,
    tiny_moe: Callable[[str], Path],
    tmp_path: Path,
    reference_backend: Callable[[Checkpoint], ExpertBackend],
) -> None:
    folder = tiny_moe(family)
    if dtype is torch.bfloat16:
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path)
        folder = tmp_path
    checkpoint, trunk = opened(folder)
    experts = reference_backend(checkpoint)
    for short, long in zip(run(trunk, experts, True), run(trunk, experts, False), strict=True):
        assert torch.equal(short, long)


def test_the_choice_spares_disks_in_both(
    tiny_moe: Callable[[str], Path], reference_backend: Callable[[Checkpoint], ExpertBackend]
) -> None:
    checkpoint, trunk = opened(tiny_moe("qwen3_moe"))
    plain = reference_backend(checkpoint)
    on_disk = np.arange(checkpoint.manifest.layers[0].experts) % 2 == 0
    tiers = SimpleNamespace(slow=True, margin=3.0, on_disk=lambda layer: on_disk, expect=lambda layers: None)
    sparing: Any = SimpleNamespace(submit=plain.submit, tiers=tiers)
    short, long, own = run(trunk, sparing, True), run(trunk, sparing, False), run(trunk, plain, True)
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    assert not torch.equal(short[0], own[0])


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_next", "glm4_moe", "deepseek_v3"])
def test_the_shared_expert_is_computed_while_nodes_work(
    family: str,
    short: bool,
    tiny_moe: Callable[[str], Path],
    reference_backend: Callable[[Checkpoint], ExpertBackend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each layer after the nodes are asked, and before they are waited for."""
    checkpoint, trunk = opened(tiny_moe(family))
    plain, done = reference_backend(checkpoint), []

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (done.append(what), call(*arguments))[1]

    class Waiting:
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def __await__(self) -> Any:
            done.append("wait")
            return (yield from self.answer.__await__())

    def submit(*arguments: Any) -> Waiting:
        done.append("ask")
        return Waiting(plain.submit(*arguments))

    if short:
        monkeypatch.setattr(DecoderLayer, "mlp", noted("compute", DecoderLayer.mlp))
    else:
        monkeypatch.setattr(DenseMlp, "compute", noted("compute", DenseMlp.compute))
    run(trunk, SimpleNamespace(submit=submit), short)  # type: ignore[arg-type]
    moe, layers = len(checkpoint.manifest.layers), len(trunk._parts.layers)
    of_a_pass = ["compute"] * (layers - moe) + ["ask", "compute", "wait"] * moe  # dense layers come first
    assert done == of_a_pass * len(CHUNKS)


def test_passes_that_take_turns_do_not_share_memory(
    tiny_moe: Callable[[str], Path], reference_backend: Callable[[Checkpoint], ExpertBackend]
) -> None:
    checkpoint, trunk = opened(tiny_moe("qwen3_5_moe_text"))
    experts = reference_backend(checkpoint)
    prompts = [torch.arange(3, 3 + count) for count in (9, 4, 30)]

    async def one(tokens: torch.Tensor) -> torch.Tensor:
        return (await trunk.forward([SequenceInput(tokens, trunk.new_cache(), all_logits=True)], experts))[0]

    async def together() -> list[torch.Tensor]:
        return list(await asyncio.gather(*[one(tokens) for tokens in prompts]))

    for tokens, logits in zip(prompts, asyncio.run(together()), strict=True):
        assert torch.equal(logits, asyncio.run(one(tokens)))


def test_after_an_error_the_pass_s_memory_is_not_used_again(
    tiny_moe: Callable[[str], Path], reference_backend: Callable[[Checkpoint], ExpertBackend]
) -> None:
    checkpoint, trunk = opened(tiny_moe("mixtral"))
    asked: list[torch.Tensor] = []

    async def fail(layer: int, hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        asked.append(hidden)
        raise NativeLibraryError("no")

    failing: Any = SimpleNamespace(submit=fail)
    one = SequenceInput(torch.arange(3, 6), trunk.new_cache())
    with pytest.raises(NativeLibraryError):
        asyncio.run(trunk.forward([one], failing))
    before = asked[0].clone()
    asyncio.run(trunk.forward([SequenceInput(torch.arange(7, 10), trunk.new_cache())], reference_backend(checkpoint)))
    assert torch.equal(asked[0], before)  # a message from it may still be on its way
