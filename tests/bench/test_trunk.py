"""The layers that `moehive bench trunk` times are the same computation on both sides."""

import pytest
import torch

from moehive.coordinator.bench import trunk as bench
from moehive.coordinator.bench import trunk_gpu
from moehive.coordinator.bench.trunk_cases import SMALL, SMALL_FAMILIES, Case, cases
from moehive.coordinator.bench.trunk_model import ModelTensors, experts_of, random_model
from moehive.coordinator.models.generic import GenericTrunk
from moehive.coordinator.models.lean import families
from moehive.coordinator.models.lean.batch import Ops
from moehive.kernels.linear import LinearOps
from moehive.kernels.trunk_ops import TrunkOps


@pytest.mark.parametrize("family", SMALL_FAMILIES)
def test_both_trunks_give_the_same_logits(family: str) -> None:
    case = Case("64 wide", family, SMALL | {"num_hidden_layers": 4}, ("f32",), 1, 1)
    with torch.no_grad():
        model = random_model(case)
        tensors = ModelTensors(model, "f32")
        lean = families.build(model.config, tensors, Ops(LinearOps(1), TrunkOps(1)))
        eager = GenericTrunk(model, experts_of(model), family, 4096)
        ours, theirs = (bench.Decode(one).token() for one in (lean, eager))
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-4 * max(1.0, float(theirs.std()))
    assert tensors.layer_bytes > 4 * 4 * 64 * 64, "each layer's matrices are counted"


def test_a_gpu_s_row_holds_what_was_measured() -> None:
    case = Case("64 wide", "mixtral", SMALL | {"num_hidden_layers": 2}, ("f32",), 1, 1, prompt=3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        (row,) = trunk_gpu.measure(case, device, repeats=1, read_bytes=1 << 20)
    assert (row.family, row.shape, row.format, row.threads) == ("mixtral", "64 wide", "f32", 0)
    assert min(row.layer_us, row.eager_us, row.bytes, row.read_bandwidth) > 0
    assert row.bandwidth == pytest.approx(row.bytes / row.layer_us * 1e6)


def test_a_row_holds_what_was_measured() -> None:
    case = Case("64 wide", "mixtral", SMALL | {"num_hidden_layers": 2}, ("f32",), 2, 1, prompt=40)
    with torch.no_grad():
        (row,) = bench._measure(case, 1, repeats=1)
    assert (row.family, row.shape, row.format, row.threads) == ("mixtral", "64 wide", "f32", 1)
    assert min(row.layer_us, row.eager_us, row.bytes, row.read_bandwidth) > 0
    assert row.bandwidth == pytest.approx(row.bytes / row.layer_us * 1e6)
    assert row.ratio == pytest.approx(row.bandwidth / row.read_bandwidth)
    assert row.context == 40 and row.bytes > 40 * 2 * 16 * 2 * 4, "keys and values of the tokens are counted"


def test_the_real_shapes_are_the_models_own() -> None:
    case = next(case for case in cases(quick=False) if case.shape == "qwen3-30b")
    model = random_model(case._replace(config=case.config | {"num_hidden_layers": 1}))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (32 * 128, 2048)
    assert shapes["model.layers.0.self_attn.v_proj.weight"] == (4 * 128, 2048)
    assert shapes["model.layers.0.mlp.gate.weight"] == (128, 2048)
