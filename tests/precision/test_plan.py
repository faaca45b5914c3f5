"""A choice of formats, measured at the model's output on text that nothing was fitted to."""

import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moehive.coordinator.bench.trained_like import save_trained_like, texts
from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.checkpoints.opening import ModelSource, open_model
from moehive.coordinator.models.base import Trunk
from moehive.coordinator.models.lean import families
from moehive.coordinator.models.lean.batch import Ops
from moehive.coordinator.models.tensors import Replaced
from moehive.coordinator.precision.calibration import projections
from moehive.coordinator.precision.encode import encode
from moehive.coordinator.precision.forward import Experts, divergence, divergences, greedy, log_probabilities
from moehive.coordinator.precision.plan import Calibrated, Measured, calibrate, measure, plan, probes_of
from moehive.coordinator.precision.trunk_parts import TrunkMatrices, encode_matrix
from moehive.coordinator.trunk import load_trunk
from moehive.kernels.blob import decode_tensor, tensor_views
from moehive.kernels.geometry import ExpertId, Format, Manifest
from moehive.kernels.linear import LinearOps, LinearWeights
from moehive.kernels.ops import ExpertOps
from moehive.kernels.trunk_ops import TrunkOps

OPS = ExpertOps(1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelSource:
    config = MixtralConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    save_trained_like(config, folder)
    return open_model(str(folder))


@pytest.fixture(scope="module")
def trunk(source: ModelSource) -> Trunk:
    return load_trunk(source, 1)


@pytest.fixture(scope="module")
def calibrated(source: ModelSource, trunk: Trunk, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    experts = Experts(source.manifest, source.expert_blob, OPS, 1 << 30)
    return calibrate(trunk, experts, texts((1024, 256))[0], tmp_path_factory.mktemp("inputs"), lambda *_: None)


@pytest.fixture(scope="module")
def measured(source: ModelSource, calibrated: Calibrated) -> Measured:
    return measure(source.manifest, source.expert_blob, calibrated, lambda *_: None)


def rounded_experts(source: ModelSource, changed: Manifest, calibrated: Calibrated | None) -> Experts:
    def read(expert: ExpertId) -> torch.Tensor:
        old, new = (m.layers[expert.layer].spec_of(expert.expert) for m in (source.manifest, changed))
        known = None if calibrated is None else (calibrated.inputs[expert.layer], expert.expert)
        return encode(old, source.expert_blob(expert), new, known)

    return Experts(changed, read, OPS, 0)


def kl(source: ModelSource, trunk: Trunk, changed: Manifest, calibrated: Calibrated | None) -> float:
    held_back = texts((1024, 256))[1]
    exact = log_probabilities(trunk, Experts(source.manifest, source.expert_blob, OPS, 0), held_back)
    return divergence(exact, log_probabilities(trunk, rounded_experts(source, changed, calibrated), held_back))


def uniform(source: ModelSource, name: Format) -> Manifest:
    layers = tuple(
        replace(layer, spec=replace(layer.spec, format=name, down_format=None)) for layer in source.manifest.layers
    )
    return replace(source.manifest, layers=layers)


def test_the_greedy_answer_is_transformers_own(source: ModelSource, trunk: Trunk, folder: Path) -> None:
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = texts((1024, 256))[1][0][:20]
    expected = model.generate(prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 20:].tolist()
    assert len(set(expected)) > 1
    experts = Experts(source.manifest, source.expert_blob, OPS, 0)
    assert greedy(trunk, experts, prompt, 12, frozenset()) == expected
    assert greedy(trunk, experts, prompt, 12, frozenset(expected[3:4])) == expected[: expected.index(expected[3])]


class Reads:
    """Reads a model's experts: how often each, and how many bytes of them were in memory at once at most."""

    def __init__(self, source: ModelSource) -> None:
        self.counts: Counter[ExpertId] = Counter()
        self.most_bytes = 0
        self._source = source
        self._blobs: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, expert: ExpertId) -> torch.Tensor:
        blob = self._source.expert_blob(expert)
        self.counts[expert] += 1
        self._blobs = [*(ref for ref in self._blobs if ref() is not None), weakref.ref(blob)]
        self.most_bytes = max(self.most_bytes, len(self._blobs) * len(blob))
        return blob


def test_a_layer_is_read_once_for_all_passes(source: ModelSource, trunk: Trunk, tmp_path: Path) -> None:
    reads = Reads(source)
    experts = Experts(source.manifest, reads, OPS, 0)
    calibrate(trunk, experts, texts((1024, 256))[0], tmp_path, lambda *_: None)
    # For the text, for what is said to a part of it, for both rounded layers, and to be rounded.
    assert max(reads.counts.values()) <= 4
    # What one layer is asked for, and an expert that is being rounded.
    assert reads.most_bytes <= source.manifest.layers[0].nbytes * 5 // 4


def test_as_much_is_held_as_fits(source: ModelSource, trunk: Trunk) -> None:
    layer = source.manifest.layers[0].nbytes
    reads = Reads(source)
    experts = Experts(source.manifest, reads, OPS, layer * 3 // 2)
    text = texts((1024, 256))[1][0]
    for _ in range(3):
        list(log_probabilities(trunk, experts, [text]))
    assert reads.most_bytes <= layer * 3 // 2
    # Half of the eight stays: a layer must be whole while it is asked.
    assert sorted(reads.counts.values()) == [1, 1, 1, 1, 3, 3, 3, 3]


def test_passes_in_step_say_what_they_say_alone(source: ModelSource, trunk: Trunk) -> None:
    held_back = texts((1024, 512))[1]
    exact = list(log_probabilities(trunk, Experts(source.manifest, source.expert_blob, OPS, 0), held_back))
    others = [rounded_experts(source, uniform(source, name), None) for name in ("q2_k", "q4_k", "q8_0")]
    found = list(divergences(exact, ((trunk, one) for one in others), held_back))
    assert found == [divergence(exact, log_probabilities(trunk, one, held_back)) for one in others]
    assert found == sorted(found, reverse=True) and found[-1] > 0


@pytest.mark.parametrize("name", ["q2_k", "q4_k"])
def test_less_divergence_than_a_uniform_format_of_the_same_bytes(
    source: ModelSource, trunk: Trunk, calibrated: Calibrated, measured: Measured, name: Format
) -> None:
    same = uniform(source, name)
    chosen = plan(measured, same.total_bytes)
    assert chosen is not None
    assert chosen.nbytes <= same.total_bytes
    assert chosen.bound <= chosen.damage <= 1.5 * chosen.bound  # sixteen parts: one step is much
    ours = kl(source, trunk, replace(source.manifest, layers=chosen.layers), calibrated)
    assert ours < 0.9 * kl(source, trunk, same, None)
    # What the choice was made by is about what comes of it.
    assert chosen.damage / 4 < ours < chosen.damage * 4


def test_all_the_bytes_change_nothing(source: ModelSource, measured: Measured) -> None:
    chosen = plan(measured, source.manifest.total_bytes)
    assert chosen is not None
    assert chosen.damage == 0
    assert {pair for layer in chosen.layers for pair in layer.formats} == {("bf16", "bf16")}


def test_too_few_bytes_are_no_choice(measured: Measured) -> None:
    assert plan(measured, 1000) is None


def test_damage_of_a_projection_is_what_the_layer_changes_by(source: ModelSource, calibrated: Calibrated) -> None:
    spec = source.manifest.layers[0].spec
    inputs, expert = calibrated.inputs[0], 1
    blob = source.expert_blob(ExpertId(0, expert))
    views = tensor_views(spec, blob)
    up, down = (decode_tensor(place, views[place.name]) for place in spec.tensors)
    x, counts = inputs.of(expert)

    def output(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, linear = (x @ up.T).chunk(2, 1)
        return (torch.nn.functional.silu(gate) * linear) @ down.T

    generator = torch.Generator().manual_seed(5)
    parts = projections(spec, blob, inputs, expert)
    for part, weight in zip(parts, (up, down), strict=True):
        noise = 1e-3 * torch.randn(weight.shape, generator=generator)
        changed = output(up + noise, down) if part.name == "up" else output(up, down + noise)
        expected = float(((changed - output(up, down)).square().sum(1) * counts).sum())
        assert part.damage(weight + noise, slice(None)) == pytest.approx(expected, rel=0.6)


def test_the_trunk_gives_bytes_to_where_they_are_worth_more(
    source: ModelSource, calibrated: Calibrated, measured: Measured
) -> None:
    assert isinstance(source, Checkpoint)
    tensors = source.trunk_tensors()
    matrices = TrunkMatrices.of(source.config, tensors, frozenset(tensors.plain_matrices()), 1)
    assert matrices is not None
    text, held_back = texts((1024, 256))
    exact = Experts(source.manifest, source.expert_blob, OPS, 1 << 30)
    parts = matrices.measure(exact, text, probes_of(text), lambda *_: None)
    names = {part.name for part in parts}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"} <= names
    assert not any("gate" in name or "norm" in name for name in names)
    assert 4 * matrices.least_bytes < matrices.own_bytes
    third = source.manifest.total_bytes // 3
    more, alone = plan(measured, matrices.own_bytes + third, parts), plan(measured, third)
    assert more is not None and alone is not None
    assert more.damage < 0.8 * alone.damage
    budget = (matrices.own_bytes + source.manifest.total_bytes) // 4
    both = plan(measured, budget, parts)
    assert both is not None and both.trunk
    sizes = {part.name: dict(zip(part.formats, part.options, strict=True)) for part in parts}
    own = sum(part.options[0].nbytes for part in parts if part.name not in both.trunk)
    assert both.nbytes + own + sum(sizes[name][fmt].nbytes for name, fmt in both.trunk.items()) <= budget

    # What the choice was made by is about what comes of it.
    rounded = {
        part.name: LinearWeights(
            both.trunk[part.name],
            part.rows,
            part.columns,
            torch.cat(list(encode_matrix(tensors.linear(part.name), both.trunk[part.name], part.inputs.squares))),
        )
        for part in parts
        if part.name in both.trunk
    }
    ops = Ops(LinearOps(1), TrunkOps(1))
    changed = families.build(source.config, Replaced(tensors, rounded), ops)
    experts = rounded_experts(source, replace(source.manifest, layers=both.layers), calibrated)
    ours = divergence(
        log_probabilities(matrices.trunk, exact, held_back), log_probabilities(changed, experts, held_back)
    )
    assert both.damage / 4 < ours < both.damage * 4
