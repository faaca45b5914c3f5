"""What one token reads of a trunk, from headers alone: as much as the loaded trunk holds."""

from pathlib import Path

import pytest
from by_path import load

from moehive.coordinator.bench import random_gguf
from moehive.coordinator.bench.random_file import random_file
from moehive.coordinator.bench.random_model import RandomModel
from moehive.coordinator.bench.trunk_bytes import read_bytes_a_token, state_bytes
from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.estimate.geometries import GEOMETRIES, ModelShape
from moehive.coordinator.models.generic import GenericTrunk
from moehive.coordinator.models.lean.trunk import LeanTrunk
from moehive.coordinator.trunk import load_trunk
from moehive.kernels.mla import Mla


def held_bytes(trunk: LeanTrunk) -> int:
    """Of all matrices in the trunk's memory, and what latent attention multiplies, but without norms."""
    parts = trunk._parts
    total = len(parts.head.blob)
    for layer in parts.layers:
        mixer, mlp, router = layer.attention.mixer, layer.mlp.here, layer.mlp.router
        found = [*mixer.projections, mixer.output, mixer.queries]
        if mlp is not None:
            found += [mlp.gate, mlp.up, mlp.down, mlp.share]
        if router is not None:
            found.append(router.weights)
        total += sum(len(one.blob) for one in found if one is not None)
        if isinstance(mixer.owner, Mla):
            total += mixer.owner.layer.up.nbytes
    return total


@pytest.mark.parametrize("format", ["q4_0", "q8_0", "fp8_block"])
def test_latent_attention_is_counted_as_it_is_held(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_gguf, "VOCABULARY", 512)
    known = GEOMETRIES["kimi-k2"]
    keys = {
        **known.keys, "attention.head_count": 2, "attention.q_lora_rank": 256, "attention.kv_lora_rank": 512,
        "feed_forward_length": 256,
    }  # fmt: skip
    monkeypatch.setitem(GEOMETRIES, "small", ModelShape(known.arch, 3, 512, 8, 4, 256, 512, keys, known.tensors))
    file = random_file(RandomModel(geometry="small", format=format, layers=2, experts=5), tmp_path)
    trunk = load_trunk(open_model(str(file)), 1)
    assert isinstance(trunk, LeanTrunk)
    assert read_bytes_a_token(file) == pytest.approx(held_bytes(trunk), rel=0.02)  # but for norms
    assert state_bytes(trunk) == 0


def test_recurrent_states_are_counted(tmp_path: Path) -> None:
    families = load(Path(__file__).parents[1] / "coordinator" / "families.py")
    for family in ("qwen3_5_moe_text", "dots1"):
        families.make_checkpoint(family, tmp_path / family)
    checkpoint = Checkpoint.open(tmp_path / "qwen3_5_moe_text")
    config = checkpoint.config
    layers = sum(kind == "linear_attention" for kind in config.layer_types)
    keys, values = (
        getattr(config, f"linear_num_{kind}_heads") * getattr(config, f"linear_{kind}_head_dim")
        for kind in ("key", "value")
    )
    width = -(-config.linear_value_head_dim // 16) * 16  # of whole vectors
    matrix = config.linear_num_value_heads * config.linear_key_head_dim * width
    inputs = (config.linear_conv_kernel_dim - 1) * (2 * keys + values)
    assert layers and state_bytes(load_trunk(checkpoint, 1)) == layers * 4 * (matrix + inputs)
    generic = load_trunk(Checkpoint.open(tmp_path / "dots1"), 1)
    assert isinstance(generic, GenericTrunk) and state_bytes(generic) == 0
