"""A node's GPU tier, interpreted where there is no GPU: what it computes, what moves up, what is copied."""

import numpy as np
import pytest
import torch

from moehive.expert_node.executor import Executor
from moehive.expert_node.store import ExpertStore
from moehive.expert_node.tiers.gpu import GpuTier
from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.kernels.gpu.decode import DecodeLayer
from moehive.kernels.gpu.experts import GpuExperts
from moehive.kernels.ops import ExpertOps, Reduction, load_expert
from moehive.proto.tensors import Routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXPERTS, HIDDEN = 6, 64


@pytest.fixture(scope="module")
def blobs():
    spec = ExpertSpec(hidden_size=HIDDEN, intermediate_size=32, activation="silu", format="f32")
    generator = torch.Generator().manual_seed(0)
    return spec, {
        number: build_blob(
            spec, {t.name: torch.randn(t.shape, generator=generator) / t.shape[-1] ** 0.5 for t in spec.tensors}
        )
        for number in range(EXPERTS)
    }


def executor_of(blobs, room, folder=None):
    """With a GPU that holds `room` experts; with `folder`, over a disk."""
    spec, all_blobs = blobs
    ops = ExpertOps(1)
    nbytes = GpuExperts(DEVICE).nbytes(spec)
    gpu = GpuTier(DEVICE, room * nbytes, ops) if room else None
    manifest = Manifest("m", "0" * 64, (LayerGeometry(EXPERTS, 2, spec),))
    ram = manifest.total_bytes if folder is None else 4 * (spec.nbytes + 4096)
    store = ExpertStore(ram, manifest.total_bytes, gpu)
    store.use(manifest, 1)
    store.make_room(manifest.total_bytes, ())
    for number, blob in all_blobs.items():
        path = None
        if folder is not None:
            path = folder / str(number)
            path.write_bytes(blob.numpy().tobytes())
        store.add(ExpertId(0, number), load_expert(spec, blob), path)
    return Executor(store, ops)


def request(experts, tokens=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = len(experts) // tokens
    weights = torch.rand(len(experts), generator=generator).numpy()
    offsets = np.arange(0, len(experts) + 1, k, dtype=np.uint32)
    return torch.randn(tokens, HIDDEN, generator=generator), Routing(
        offsets, np.array(experts, dtype=np.uint32), weights
    )


@pytest.mark.parametrize("disk", [False, True])
def test_answers_are_the_cpus_within_rounding(blobs, tmp_path, disk):
    cpu, both = executor_of(blobs, 0), executor_of(blobs, 2, tmp_path if disk else None)
    gpu = both.store.gpu
    for step, experts in enumerate([[0, 1], [0, 2], [0, 1], [3, 0], [0, 1, 2, 3], [4, 5, 0, 1]]):
        hidden, routing = request(experts, max(1, len(experts) // 2), step)
        for reduction in Reduction:
            got, _ = both.compute(0, hidden, routing, reduction)
            torch.testing.assert_close(got, cpu.compute(0, hidden, routing, reduction)[0], rtol=1e-4, atol=1e-5)
        assert gpu.bytes_held <= gpu.capacity_bytes
    assert len(gpu.layer(0)) == 2 and 0 in gpu.layer(0)  # the one that is used most
    both.store.retain({ExpertId(0, 5)})
    assert gpu.layer(0).keys() <= {5}


def test_a_pinned_expert_comes_and_stays(blobs):
    both = executor_of(blobs, 2)
    both.store.pin(frozenset(), frozenset({ExpertId(0, 5)}))
    for experts in ([0, 1], [0, 1], [0, 5], [0, 1], [2, 3], [0, 1], [2, 3]):
        hidden, routing = request(experts)
        both.compute(0, hidden, routing, Reduction.PARTIAL_SUM)
    assert 5 in both.store.gpu.layer(0)
    assert both.store.gpu.bytes_held <= both.store.gpu.capacity_bytes


class Clock:
    """Time that only arithmetic takes: the CPU `token_s` for each, a copy to the GPU `copy_s`, the GPU nothing."""

    def __init__(self, monkeypatch, token_s, copy_s):
        self.now, self.copies = 0.0, 0
        load, compute = GpuExperts.load_blob, ExpertOps.moe_layer

        def copying(gpu, spec, blob):
            self.now += copy_s
            self.copies += 1
            return load(gpu, spec, blob)

        def computing(ops, spec, held, hidden, *rest):
            self.now += token_s * len(hidden)
            return compute(ops, spec, held, hidden, *rest)

        monkeypatch.setattr(GpuExperts, "load_blob", copying)
        monkeypatch.setattr(ExpertOps, "moe_layer", computing)
        monkeypatch.setattr("moehive.expert_node.tiers.gpu.perf_counter", lambda: self.now)


@pytest.mark.parametrize("disk", [False, True])
def test_an_expert_is_copied_for_as_many_tokens_as_pay(blobs, tmp_path, monkeypatch, disk):
    both = executor_of(blobs, 1, tmp_path if disk else None)
    gpu, spec = both.store.gpu, blobs[0]
    gpu.capacity_bytes = 0  # nothing stays
    clock = Clock(monkeypatch, token_s=1, copy_s=3)
    both.store.prepare()
    assert gpu.break_even == {spec: 4}  # of those tried, the first that takes the CPU more than 3
    measured = clock.copies
    both.store.prepare()
    assert clock.copies == measured  # what is known is not measured again
    hidden, routing = request([0, 1, 0, 2, 0, 1, 0, 3], 4)
    got, _ = both.compute(0, hidden, routing, Reduction.PER_EXPERT)
    assert clock.copies == measured + 1  # expert 0, which all four tokens want
    wanted, _ = executor_of(blobs, 0).compute(0, hidden, routing, Reduction.PER_EXPERT)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    both.compute(0, *request([0, 1, 0, 2, 0, 1], 3), Reduction.PER_EXPERT)
    assert clock.copies == measured + 1


def test_where_copying_never_pays_nothing_is_copied(blobs, monkeypatch):
    both = executor_of(blobs, 1)
    both.store.gpu.capacity_bytes = 0
    monkeypatch.setattr("moehive.expert_node.tiers.gpu.TRIED_TOKENS", (1, 4))
    clock = Clock(monkeypatch, token_s=1, copy_s=5)
    both.store.prepare()
    measured = clock.copies
    both.compute(0, *request([0] * 20, 20), Reduction.PER_EXPERT)
    assert measured and clock.copies == measured


def test_the_recorded_layer_is_the_layer(blobs):
    spec, all_blobs = blobs
    gpu = GpuExperts(DEVICE)
    held = {number: gpu.load_blob(spec, blob) for number, blob in all_blobs.items()}
    recorded = DecodeLayer(gpu, spec, 2)
    for seed, experts in enumerate([[0, 1], [4, 2], [5, 0]]):
        hidden, routing = request(experts, 1, seed)
        for reduction in Reduction:
            got = recorded(held, hidden, routing.experts, routing.weights, reduction).cpu()
            assert torch.equal(got, gpu.moe_layer(spec, held, hidden, *routing, reduction).cpu())


def test_a_format_without_a_kernel_stays_on_the_cpu(blobs):
    spec = ExpertSpec(hidden_size=HIDDEN, intermediate_size=32, activation="silu", format="q5_0")
    tensors = {t.name: torch.randn(t.shape) for t in spec.tensors}
    other = spec, {number: build_blob(spec, tensors) for number in range(EXPERTS)}
    both = executor_of(blobs, 2)
    manifest = Manifest("n", "1" * 64, (LayerGeometry(EXPERTS, 2, spec),))
    both.store.use(manifest, 2)
    for number, blob in other[1].items():
        both.store.add(ExpertId(0, number), load_expert(spec, blob))
    both.store.prepare()
    hidden, routing = request([0, 1])
    got, _ = both.compute(0, hidden, routing, Reduction.PARTIAL_SUM)
    assert torch.isfinite(got).all() and both.store.gpu.bytes_held == 0
    assert not both.store.gpu.break_even
