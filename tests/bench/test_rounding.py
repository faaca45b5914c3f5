"""What 8 bits do to logits: the experts behind the measurement's messages are the real ones, rounded or not."""

import asyncio
import tarfile
from pathlib import Path

import pytest
import torch

from moehive.coordinator.bench import rounding
from moehive.coordinator.bench.rounding import _Rounding
from moehive.coordinator.dispatch.local import LocalExperts
from moehive.kernels.blob import build_blob, tensor_views
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.reference import expert_forward
from moehive.proto.tensors import write_head

EXPERTS, TOP_K, TOKENS = 7, 3, 20
SPEC = ExpertSpec(hidden_size=128, intermediate_size=48, activation="silu", format="f32")
MANIFEST = Manifest("made-up", "0" * 64, (LayerGeometry(EXPERTS, TOP_K, SPEC),))


def blob(expert: ExpertId) -> torch.Tensor:
    generator = torch.Generator().manual_seed(expert.expert)
    return build_blob(SPEC, {t.name: torch.randn(t.shape, generator=generator) * 0.2 for t in SPEC.tensors})


def test_only_the_rounding_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 128, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    experts = LocalExperts(MANIFEST, 1)
    experts.hold([ExpertId(0, number) for number in range(EXPERTS)], blob)

    async def compute(eight_bit: bool) -> torch.Tensor:
        return await _Rounding(experts, [EXPERTS], eight_bit).submit(0, hidden, ids, weights)

    exact, rounded = asyncio.run(compute(False)), asyncio.run(compute(True))
    wanted = torch.zeros_like(hidden)
    for token in range(TOKENS):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            views = tensor_views(SPEC, blob(ExpertId(0, expert)))
            wanted[token] += weight * expert_forward(SPEC, views, hidden[token : token + 1])[0]
    torch.testing.assert_close(exact, wanted, atol=1e-4, rtol=1e-4)
    assert 0 < (rounded - exact).norm() < 0.03 * exact.norm()  # 7 bits and a sign, twice


def test_what_8_bits_do_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mixtral of 2.3 MB that llama.cpp wrote, whose random weights make logits that differ little."""
    archive = Path(__file__).parents[1] / "checkpoints" / "llama_cpp" / "mixtral.tar.xz"
    with tarfile.open(archive) as packed:
        packed.extract("Q4_K_M.gguf", tmp_path, filter="data")
    monkeypatch.setattr(rounding, "TOKENS", 40)
    model = str(tmp_path / "Q4_K_M.gguf")
    found = rounding.measure_rounding(model)
    assert found.tokens == 40 and 0 < found.kl < 1e-2 and 0.8 < found.same_choice <= 1
    monkeypatch.setattr(rounding, "write_head", lambda request, states, _: write_head(request, states, False))
    assert rounding.measure_rounding(model) == rounding.Rounding(40, 0.0, 1.0)
