"""`moehive bench tiers` on a small model: its figures hang together, and the memory limit holds."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from moehive.coordinator.bench import cache_aware, tiers
from moehive.coordinator.bench.memory_group import memory_group
from moehive.coordinator.bench.trained_like import save_trained_like, texts
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.dispatch.local import LocalExperts
from moehive.coordinator.trunk import load_trunk
from moehive.kernels.geometry import ExpertId, ExpertSpec

SMALL = MixtralConfig(
    vocab_size=1024, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_local_experts=8,
    num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
)  # fmt: skip


@pytest.mark.parametrize("grouped", [True, False], ids=["in a group", "without"])
def test_a_small_run_stays_within_its_memory(grouped, tmp_path, monkeypatch):
    spec = ExpertSpec(hidden_size=2048, intermediate_size=1024, activation="silu", format="q8_0")
    monkeypatch.setattr(tiers, "SPEC", spec)
    monkeypatch.setattr(tiers, "EXPERTS", 16)
    monkeypatch.setattr(tiers, "TOP_K", 2)
    monkeypatch.setattr(tiers, "MARGINS", (0.3,) if grouped else ())
    monkeypatch.setattr(tiers, "KL_TOKENS", 16)
    monkeypatch.setattr(cache_aware, "CONFIGS", {"small": SMALL})
    if not grouped:
        monkeypatch.setattr(tiers, "memory_group", lambda _: nullcontext(None))
    report = tiers.measure_tiers(quick=True, model=None, folder=tmp_path)
    ways = ["no prefetch", "prefetch", "prefetch, cache-aware 0.3"]
    assert [row.way for row in report.rows] == ways[: len(report.rows)]
    for row in report.rows:
        # Were all experts in memory, twice the allowance, the process would be beyond its limit, in a group or not.
        assert row.process_bytes + row.ram_bytes > row.process_limit_bytes
        assert row.ram_bytes < row.process_bytes <= row.process_limit_bytes
        assert 0 < row.hit_rate < 1 and row.decode_tokens_per_s > 0
        assert row.most_ram_bytes <= row.ram_bytes and row.killed == 0
        assert row.group_limit_bytes in ((0, row.process_limit_bytes) if grouped else (0,))
        if row.group_limit_bytes:
            assert row.ram_bytes < row.group_peak_bytes <= row.group_limit_bytes
    assert report.rows[0].foreseen_rate == 0 < report.rows[1].foreseen_rate
    if grouped:
        assert report.rows[2].hit_rate > report.rows[1].hit_rate - 0.02
    assert all(0 < rate < 1 for rate in report.policies.values())
    if grouped:
        assert list(report.divergence) == ["prefetch, cache-aware 0.3"]
        assert list(report.divergence["prefetch, cache-aware 0.3"]) == ["small"]
    for named, came in report.transitions:  # chance would name an eighth, of which an eighth came
        assert 1 / 8 < came <= 1 and 0 < named < 1
    assert list(tmp_path.iterdir()) == []
    if grouped and not report.rows[0].group_limit_bytes:
        pytest.skip("this user may make no control group: the figures are right, but nothing enforced the limit")


def test_what_cache_aware_routing_costs(tmp_path):
    """Nothing without a margin; the rest against transformers' own numbers for the model's own routing."""
    save_trained_like(SMALL, tmp_path)
    source, ids = open_model(str(tmp_path)), texts((24, 0))[0][0].tolist()
    none, some, much = cache_aware.divergences(source, ids, (0.0, 0.3, 10.0))
    assert abs(none.kl) < 1e-6 < some.kl < much.kl
    assert 0 < none.hit_rate < some.hit_rate < much.hit_rate
    local = LocalExperts(source.manifest, 1)
    local.hold((ExpertId(n, e) for n in range(2) for e in range(8)), source.expert_blob)
    backend = cache_aware._HalfInMemory(source.manifest, local, 0.0)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        theirs = model(torch.tensor([ids])).logits[0].log_softmax(1)
        ours = cache_aware._log_probabilities(load_trunk(source, 1), backend, ids)
    assert (theirs.exp() * (theirs - ours)).sum(1).abs().max() < 1e-4


def test_a_group_is_gone_afterwards():
    with memory_group(64 << 20) as group:
        if group is None:
            pytest.skip("this user may make no control group with a memory limit")
        assert group.folder.exists() and group.killed() == 0
    assert not group.folder.exists()
