"""Each lean family: logits, cache, chunks and batches as transformers gives them on the same checkpoint."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from by_path import load
from transformers import AutoModelForCausalLM

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.base import SequenceInput, Trunk
from moehive.coordinator.models.lean.mlp import MoeMlp
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk

_families = load(Path(__file__).with_name("families.py"))

TOLERANCE = 1e-4
LENGTH = 110  # tokens: four pages, many windows
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}

# name → family, what is changed in its tiny config
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, window, tied, one key head": (
        "mixtral",
        {"sliding_window": 40, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "mixtral, llama3 rope, 24 heads of 6": (
        "mixtral",
        {"rope_parameters": LLAMA3, "num_attention_heads": 24, "num_key_value_heads": 1, "head_dim": 6},
    ),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, a dense layer, biases, normed top-k, linear rope": (
        "qwen3_moe",
        {
            "mlp_only_layers": [1],
            "attention_bias": True,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "glm4_moe": ("glm4_moe", {"use_qk_norm": True}),
    "glm4_moe, groups, half rotary": (
        "glm4_moe",
        {
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_oss": ("gpt_oss", {"rope_parameters": YARN}),
    "gpt_oss, window over pages": ("gpt_oss", {"sliding_window": 33, "num_key_value_heads": 4}),
}


def make(family: str, changes: dict[str, Any], folder: Path) -> None:
    """As families.make_checkpoint, with a changed config."""
    kept = _families.OVERRIDES[family]
    _families.OVERRIDES[family] = kept | changes
    try:
        _families.make_checkpoint(family, folder)
    finally:
        _families.OVERRIDES[family] = kept


@pytest.fixture(scope="module", params=list(CASES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference_backend: Any
) -> tuple[LeanTrunk, Any, torch.Tensor, torch.Tensor]:
    """A trunk, its experts, tokens [LENGTH] and transformers' logits of them [LENGTH, vocab]."""
    folder = tmp_path_factory.mktemp("lean")
    make(*CASES[request.param], folder)
    tokens = torch.randint(3, _families.VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(4))
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    with torch.no_grad():
        expected = model(input_ids=tokens[None]).logits[0]
    assert expected.std() > 0.1
    checkpoint = Checkpoint.open(folder)
    trunk = load_trunk(checkpoint, threads=2)
    assert isinstance(trunk, LeanTrunk)
    return trunk, reference_backend(checkpoint), tokens, expected


def run(trunk: LeanTrunk, backend: Any, tokens: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """All logits of one sequence whose passes end at `cuts`."""
    cache = trunk.new_cache()

    async def passes() -> list[torch.Tensor]:
        parts = torch.tensor_split(tokens, cuts)
        return [(await trunk.forward([SequenceInput(part, cache, all_logits=True)], backend))[0] for part in parts]

    result = torch.cat(asyncio.run(passes()))
    trunk.free_cache(cache)
    return result


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_one_pass(case: Any) -> None:
    trunk, backend, tokens, expected = case
    assert_close(run(trunk, backend, tokens, []), expected)


@pytest.mark.parametrize(
    "cuts", [[31], [33, 64, 70], list(range(40, LENGTH))], ids=["page", "chunks", "token by token"]
)
def test_chunks(case: Any, cuts: list[int]) -> None:
    trunk, backend, tokens, expected = case
    assert_close(run(trunk, backend, tokens, cuts), expected)


def test_batches_of_unequal_lengths(case: Any) -> None:
    """Sequences at different places, one of them only beginning; each equals transformers and itself alone."""
    trunk, backend, tokens, expected = case
    starts, counts = (0, 31, 64, 90), (45, 1, 33, 1)
    caches = [trunk.new_cache() for _ in starts]

    async def passes() -> list[torch.Tensor]:
        for start, cache in zip(starts, caches, strict=True):
            if start:
                await trunk.forward([SequenceInput(tokens[:start], cache)], backend)
        batch = [
            SequenceInput(tokens[start : start + count], cache, all_logits=True)
            for start, count, cache in zip(starts, counts, caches, strict=True)
        ]
        logits: list[torch.Tensor] = await trunk.forward(batch, backend)
        return logits

    together = asyncio.run(passes())
    for logits, start, count in zip(together, starts, counts, strict=True):
        assert_close(logits, expected[start : start + count])
    for cache in caches:
        trunk.free_cache(cache)


def test_on_a_gpu_too(case: Any, gpu_trunk: Callable[[Checkpoint], Trunk]) -> None:
    """Two sequences together: a long pass over a page's end, one token each, some of one and one of the other."""
    _, backend, tokens, expected = case
    trunk = gpu_trunk(backend.checkpoint)
    caches = [trunk.new_cache() for _ in range(2)]
    at = [0, 0]

    async def passes() -> None:
        for counts in ((44, 33), (1, 1), (1, 3)):
            batch = [
                SequenceInput(tokens[start : start + count], cache, all_logits=True)
                for start, count, cache in zip(at, counts, caches, strict=True)
            ]
            for number, logits in enumerate(await trunk.forward(batch, backend)):
                assert_close(logits, expected[at[number] : at[number] + counts[number]])
                at[number] += counts[number]

    asyncio.run(passes())
    assert trunk.cache_bytes(max(at)) >= sum(
        page.nbytes for table in caches[0].tables for page in table._pages if page is not None
    )
    for cache in caches:
        trunk.free_cache(cache)


def test_the_last_token_s_logits_alone(case: Any) -> None:
    trunk, backend, tokens, expected = case
    inputs = [SequenceInput(tokens[:50], trunk.new_cache()), SequenceInput(tokens[:7], trunk.new_cache())]
    first, second = asyncio.run(trunk.forward(inputs, backend))
    assert_close(first, expected[49])
    assert_close(second, expected[6])


def test_pages_are_counted_given_back_and_used_again(case: Any) -> None:
    trunk, backend, tokens, _ = case
    run(trunk, backend, tokens, [40])
    memories = trunk._parts.cache.memories.values()
    used = [memory.used for memory in memories]
    cache = trunk.new_cache()
    for start in range(0, LENGTH, 10):
        asyncio.run(trunk.forward([SequenceInput(tokens[start : start + 10], cache)], backend))
        held = sum(page.nbytes for table in cache.tables for page in table._pages if page is not None) + sum(
            state.nbytes for state in cache.states
        )
        assert held <= trunk.cache_bytes(start + 10)
    trunk.free_cache(cache)
    assert [memory.used for memory in memories] == used


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "gpt_oss"])
def test_bf16(family: str, tmp_path: Path, reference_backend: Any) -> None:
    """Weights, KV cache and what travels to the experts in bf16: near transformers in f32 on the same weights."""
    make(family, {}, tmp_path / "f32")
    AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16", dtype=torch.float32, experts_implementation="eager"
    ).eval()
    tokens = torch.randint(3, _families.VOCABULARY, (70,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    checkpoint = Checkpoint.open(tmp_path / "bf16")
    assert checkpoint.dtype == torch.bfloat16
    trunk = load_trunk(checkpoint, threads=1)
    assert isinstance(trunk, LeanTrunk)
    ours = run(trunk, reference_backend(checkpoint), tokens, [33, 60, 61, 62]).log_softmax(-1)
    divergence = (expected.exp() * (expected - ours)).sum(-1)
    assert divergence.median() < 1e-4  # a token whose experts are nearly a tie may be sent to others


def test_the_next_two_layers_are_foreseen(
    case: tuple[LeanTrunk, Any, torch.Tensor, torch.Tensor],
) -> None:
    trunk, backend, tokens, _ = case
    told: list[list[list[int]]] = []
    tiers = SimpleNamespace(slow=True, margin=0.0, expect=told.append)
    foreseeing = SimpleNamespace(submit=backend.submit, tiers=tiers)
    cuts = [4, 5]  # three passes
    assert torch.equal(run(trunk, foreseeing, tokens[:6], cuts), run(trunk, backend, tokens[:6], cuts))
    routed = [isinstance(layer.mlp, MoeMlp) for layer in trunk._parts.layers]
    left = [sum(routed[number + 1 :]) for number in range(len(routed))]
    assert [len(layers) for layers in told] == 3 * [min(2, count) for count in left if count]
    assert all(len(set(experts)) == len(experts) > 0 for layers in told for experts in layers)
