"""The lean trunks with recurrent states and with latent attention, against transformers' own models."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.base import ExpertBackend, SequenceInput, Trunk
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk

TOLERANCE = 1e-4  # of logits whose spread is about 0.5
PROMPTS = (75, 1, 18, 40)
CHUNKS = (30, 1, 1, 7, 33, 100)  # over a page's end, single tokens, and at last whatever is left
GPU_PROMPTS, GPU_CHUNKS = (37, 1, 36), (33, 1, 100)  # the same in few tokens: the GPU's kernels may be interpreted

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
# A family and what its config has beyond its plain tiny one.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_next with dense layers": ("qwen3_next", {"mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {}),
    "qwen3_5_moe": ("qwen3_5_moe", {}),
    "qwen3_5_moe with odd heads": (
        "qwen3_5_moe_text",
        {"linear_key_head_dim": 12, "linear_value_head_dim": 20, "linear_num_value_heads": 6, "head_dim": 24},
    ),
    "qwen3_5_moe all recurrent": ("qwen3_5_moe_text", {"layer_types": ["linear_attention"] * 3}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 with groups": (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2, "attention_bias": True},
    ),
    "deepseek_v3 with a longer context": ("deepseek_v3", {"rope_parameters": YARN}),
    "deepseek_v3 without a latent for queries": ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
    "kimi_k25": ("kimi_k25", {}),
}


@pytest.fixture(scope="module")
def checkpoint_of(families_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(model: str) -> Path:
        if model not in made:
            family, changes = MODELS[model]
            made[model] = tmp_path_factory.mktemp("lean") / family
            families_module.make_checkpoint(family, made[model], **changes)
        return made[model]

    return make


def lean(folder: Path) -> tuple[Checkpoint, LeanTrunk]:
    checkpoint = Checkpoint.open(folder)
    trunk = load_trunk(checkpoint, 2)
    assert isinstance(trunk, LeanTrunk)
    return checkpoint, trunk


def prompts(lengths: tuple[int, ...] = PROMPTS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (tokens,), generator=generator) for tokens in lengths]


@torch.no_grad()
def expected(folder: Path, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of transformers' own model, each sequence in one pass."""
    composite = "vision_config" in json.loads((folder / "config.json").read_text())
    auto: Any = AutoModelForCausalLM
    if composite and "qwen" not in folder.name:
        auto = AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return [model(input_ids=tokens[None], use_cache=False).logits[0] for tokens in sequences]


async def in_chunks(
    trunk: Trunk, experts: ExpertBackend, sequences: list[torch.Tensor], chunks: tuple[int, ...]
) -> list[torch.Tensor]:
    """All sequences in one batch, each as long as it has tokens left; logits of every token."""
    caches = [trunk.new_cache() for _ in sequences]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    at = [0] * len(sequences)
    for chunk in chunks:
        going = [i for i, tokens in enumerate(sequences) if at[i] < len(tokens)]
        batch = [SequenceInput(sequences[i][at[i] : at[i] + chunk], caches[i], all_logits=True) for i in going]
        for i, part in zip(going, await trunk.forward(batch, experts), strict=True):
            logits[i].append(part)
            at[i] += len(part)
    for cache in caches:
        trunk.free_cache(cache)
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_transformers(
    model: str, checkpoint_of: Callable[[str], Path], reference_backend: Callable[[Checkpoint], ExpertBackend]
) -> None:
    folder = checkpoint_of(model)
    sequences = prompts()
    theirs = expected(folder, sequences)
    checkpoint, trunk = lean(folder)
    experts = reference_backend(checkpoint)
    ours = asyncio.run(in_chunks(trunk, experts, sequences, CHUNKS))
    for mine, his in zip(ours, theirs, strict=True):
        assert (mine - his).abs().max() < TOLERANCE
        assert his.std() > 0.1  # so that the tolerance means something
    whole = asyncio.run(in_chunks(trunk, experts, sequences[:1], (100,)))[0]
    assert (whole - theirs[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_on_a_gpu_too(
    model: str,
    checkpoint_of: Callable[[str], Path],
    reference_backend: Callable[[Checkpoint], ExpertBackend],
    gpu_trunk: Callable[[Checkpoint], Trunk],
) -> None:
    folder = checkpoint_of(model)
    sequences = prompts(GPU_PROMPTS)
    checkpoint = Checkpoint.open(folder)
    trunk = gpu_trunk(checkpoint)
    ours = asyncio.run(in_chunks(trunk, reference_backend(checkpoint), sequences, GPU_CHUNKS))
    for mine, his in zip(ours, expected(folder, sequences), strict=True):
        assert (mine - his).abs().max() < TOLERANCE


@pytest.mark.parametrize("model", ["qwen3_5_moe_text", "deepseek_v3"])
def test_a_freed_cache_leaves_nothing_behind(
    model: str, checkpoint_of: Callable[[str], Path], reference_backend: Callable[[Checkpoint], ExpertBackend]
) -> None:
    """What a new sequence computes depends neither on who had its pages before nor on its neighbours."""
    checkpoint, trunk = lean(checkpoint_of(model))
    experts = reference_backend(checkpoint)
    sequences = prompts()
    first = asyncio.run(in_chunks(trunk, experts, [sequences[2]], (10, 8)))[0]
    asyncio.run(in_chunks(trunk, experts, [sequences[0]], (100,)))  # other numbers into the same pages
    again = asyncio.run(in_chunks(trunk, experts, [sequences[2]], (10, 8)))[0]
    assert torch.equal(first, again)


@pytest.mark.parametrize("model", ["qwen3_next", "qwen3_5_moe with odd heads", "deepseek_v3"])
def test_cache_bytes_are_what_a_cache_holds(model: str, checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint, trunk = lean(checkpoint_of(model))
    for tokens in (1, 32, 33, 200):
        cache = trunk.new_cache()
        for table in cache.tables:
            table.extend(tokens)
        pages = sum(page.nbytes for table in cache.tables for page in table._pages if page is not None)
        assert trunk.cache_bytes(tokens) == pages + sum(state.nbytes for state in cache.states)
        trunk.free_cache(cache)
    latents = checkpoint.config.get_text_config()
    if model == "deepseek_v3":  # a token's latent and rotary key in each layer, whatever the number of heads
        per_token = 3 * (latents.kv_lora_rank + latents.qk_rope_head_dim) * 4
        assert trunk.cache_bytes(320) - trunk.cache_bytes(160) == 160 * per_token


def test_kimi_k2_is_deepseek_v3(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, reference_backend: Callable[[Checkpoint], ExpertBackend]
) -> None:
    """Its config only has another name."""
    source = checkpoint_of("deepseek_v3")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"}))
    checkpoint, trunk = lean(tmp_path)
    tokens = prompts()[2:3]
    ours = asyncio.run(in_chunks(trunk, reference_backend(checkpoint), tokens, (100,)))[0]
    assert (ours - expected(source, tokens)[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("model", ["qwen3_5_moe_text", "deepseek_v3"])
def test_bf16_keeps_to_transformers(
    model: str,
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    reference_backend: Callable[[Checkpoint], ExpertBackend],
) -> None:
    """Weights and the KV cache in bf16, sums in f32: nearer to the f32 model than transformers' in bf16.

    By the median of the tokens: one whose experts are nearly a tie may be sent to others, in either.
    """
    half = AutoModelForCausalLM.from_pretrained(checkpoint_of(model), dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    tokens = prompts()[3:]
    with torch.no_grad():
        theirs = half.eval()(input_ids=tokens[0][None]).logits[0].float()
    exact = expected(tmp_path, tokens)[0]
    checkpoint, trunk = lean(tmp_path)
    assert checkpoint.dtype == torch.bfloat16
    ours = asyncio.run(in_chunks(trunk, reference_backend(checkpoint), tokens, (30, 100)))[0]
    assert (ours - exact).norm(dim=-1).median() < 0.8 * (theirs - exact).norm(dim=-1).median()
