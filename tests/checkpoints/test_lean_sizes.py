"""Sizes that the lean trunk's kernels have no room for: the generic trunk runs them, as transformers does."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.generic import GenericTrunk
from moehive.coordinator.trunk import load_trunk


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_5_moe_text", {"linear_key_head_dim": 264}),
        ("qwen3_next", {"linear_conv_kernel_dim": 9}),
        ("deepseek_v3", {"kv_lora_rank": 1032}),
        ("deepseek_v3", {"qk_nope_head_dim": 264}),
    ],
)
def test_what_does_not_fit_falls_to_the_generic_trunk(
    family: str, changes: dict[str, Any], tmp_path: Path, families_module: ModuleType, reading: ModuleType
) -> None:
    families_module.make_checkpoint(family, tmp_path / "x", num_experts_per_tok=8, **changes)
    checkpoint = Checkpoint.open(tmp_path / "x")
    assert isinstance(load_trunk(checkpoint, 1), GenericTrunk)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32).eval()
    tokens = list(range(3, 23))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(reading.logits(checkpoint, tokens), expected, rtol=0, atol=1e-3)
