"""A node's GPU tier, interpreted where there is no GPU: what it computes, what moves up, what is copied."""

import numpy as np
import pytest
import torch
from tape import TapeRecorder

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


MIXED = [("f32", "f32"), ("q4_0", "q4_0"), ("q8_0", "f32"), ("q4_0", "q4_0"), ("q5_0", "q5_0"), ("f32", "f32")]


@pytest.fixture(scope="module")
def mixed():
    """A layer whose experts have four formats, one of which no GPU computes, and their blobs."""
    spec = ExpertSpec(hidden_size=HIDDEN, intermediate_size=32, activation="silu", format="f32")
    geometry = LayerGeometry(EXPERTS, 2, spec, tuple(MIXED))
    generator = torch.Generator().manual_seed(0)
    return geometry, [
        build_blob(
            geometry.spec_of(number),
            {t.name: torch.randn(t.shape, generator=generator) / t.shape[-1] ** 0.5 for t in spec.tensors},
        )
        for number in range(EXPERTS)
    ]


def executor_of_mixed(mixed, nbytes):
    geometry, all_blobs = mixed
    ops = ExpertOps(1)
    store = ExpertStore(1 << 30, 0, GpuTier(DEVICE, nbytes, ops) if nbytes else None)
    store.use(Manifest("m", "0" * 64, (geometry,)), 1)
    for number, blob in enumerate(all_blobs):
        store.add(ExpertId(0, number), load_expert(geometry.spec_of(number), blob))
    return Executor(store, ops)


def test_experts_of_several_formats_move_up_and_are_computed_together(mixed):
    cpu, both = executor_of_mixed(mixed, 0), executor_of_mixed(mixed, 1 << 20)
    gpu = both.store.gpu
    turns = [[0, 1], [2, 3], [0, 2], [1, 5], [3, 4], [4, 5, 0, 1], [0, 1, 2, 3, 4, 5], [3, 4, 4, 2, 0, 4]]
    for step, experts in enumerate(turns):
        hidden, routing = request(experts, len(experts) // 2, step)
        for reduction in Reduction:
            got, _ = both.compute(0, hidden, routing, reduction)
            torch.testing.assert_close(got, cpu.compute(0, hidden, routing, reduction)[0], rtol=2e-2, atol=2e-2)
    hidden, routing = request([0, 1, 2, 4, 5], 1)  # one token
    got, _ = both.compute(0, hidden, routing, Reduction.PER_EXPERT)
    torch.testing.assert_close(got, cpu.compute(0, hidden, routing, Reduction.PER_EXPERT)[0], rtol=2e-2, atol=2e-2)
    assert gpu.layer(0).keys() == {0, 1, 2, 3, 5}  # all but that in q5_0
    geometry = mixed[0]
    assert all(expert.spec == geometry.spec_of(number) for number, expert in gpu.layer(0).items())
    assert gpu.bytes_held == sum(GpuExperts(DEVICE).nbytes(geometry.spec_of(n)) for n in gpu.layer(0))


def test_a_large_expert_takes_the_place_of_several_small_ones_or_of_none(mixed):
    geometry, sizes = mixed[0], GpuExperts(DEVICE)
    small, large = sizes.nbytes(geometry.spec_of(1)), sizes.nbytes(geometry.spec_of(0))
    assert large > 2 * small
    both = executor_of_mixed(mixed, large)
    gpu = both.store.gpu
    for _ in range(3):
        both.compute(0, *request([1, 3]), Reduction.PARTIAL_SUM)
    assert gpu.layer(0).keys() == {1, 3}
    both.store.pin(frozenset(), frozenset({ExpertId(0, 1), ExpertId(0, 0)}))
    both.compute(0, *request([0, 5]), Reduction.PARTIAL_SUM)
    assert gpu.layer(0).keys() == {1, 3}  # what is pinned stays, so nothing else need go
    both.store.pin(frozenset(), frozenset({ExpertId(0, 0)}))
    both.compute(0, *request([0, 5]), Reduction.PARTIAL_SUM)
    assert gpu.layer(0).keys() == {0} and gpu.bytes_held == large


def test_each_format_has_its_own_break_even(mixed, monkeypatch):
    both = executor_of_mixed(mixed, 1 << 20)
    gpu, geometry = both.store.gpu, mixed[0]
    gpu.capacity_bytes = 0  # nothing stays
    clock = Clock(monkeypatch, token_s=1, copy_s=3)
    both.store.prepare()
    kinds = {geometry.spec_of(number) for number in (0, 1, 2)}
    assert gpu.break_even == dict.fromkeys(kinds, 4)
    gpu.break_even[geometry.spec_of(1)] = 2
    measured = clock.copies
    both.compute(0, *request([0, 1, 0, 3, 0, 1, 2, 3], 4), Reduction.PER_EXPERT)
    assert clock.copies == measured + 2  # both in q4_0; three tokens do not pay for the one in f32


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


def test_the_recorded_layer_is_the_layer(blobs, monkeypatch):
    spec, all_blobs = blobs
    gpu = GpuExperts(DEVICE)
    held = {number: gpu.load_blob(spec, blob) for number, blob in all_blobs.items()}
    recorded, recorder = DecodeLayer(gpu, spec, 2), TapeRecorder(monkeypatch)
    if recorded._recorder is None:
        recorded._recorder = recorder
    for seed, experts in enumerate([[0, 1], [4, 2], [5, 0], [3, 4]]):
        hidden, routing = request(experts, 1, seed)
        for reduction in Reduction:
            got = recorded(held, hidden, routing.experts, routing.weights, reduction).cpu()
            assert torch.equal(got, gpu.moe_layer(spec, held, hidden, *routing, reduction).cpu())
    assert DEVICE.type == "cuda" or [len(tape.calls) for tape in recorder.tapes] == [3]  # projections, and the sum


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


def test_above_a_disk_a_gpu_is_room(blobs, tmp_path):
    """RAM for four experts and a GPU for the other two: once all were asked for nothing is read, nor foreseen."""
    both = executor_of(blobs, 2, tmp_path)
    assert both.store.tier is not None and both.store.capacity_bytes < both.store.bytes_held
    everything = list(range(EXPERTS))
    for turn in range(5):
        if turn == 2:
            both.store.tier.settle()
            read = both.store.tier.reader.totals.nbytes
        for first in (0, 2, 4):
            both.compute(0, *request([first, first + 1]), Reduction.PARTIAL_SUM, (everything, everything))
    both.store.tier.settle()
    on_gpu, in_ram = both.store.gpu.layer(0).keys(), both.store.tier.resident(0)
    assert len(on_gpu) == 2 and on_gpu | in_ram == set(everything)
    assert both.store.tier.reader.totals.nbytes == read
    assert both.on_disk(0) == set() and both.in_memory(0, request(everything)[1])
    gone = next(iter(on_gpu))
    del both.store.gpu._held[0][gone]
    assert both.on_disk(0) == {gone} - in_ram and both.in_memory(0, request([gone])[1]) is (gone in in_ram)


def failing(monkeypatch, error, after):
    """Every request to the GPU but the first ones ends with an error."""
    compute, calls = GpuExperts.project, []

    def project(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise error
        compute(*arguments)

    monkeypatch.setattr(GpuExperts, "project", project)
    return calls


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error")]
)
def test_a_gpu_that_fails_leaves_its_experts_to_the_cpu(blobs, tmp_path, monkeypatch, caplog, error, disk):
    cpu, both = executor_of(blobs, 0), executor_of(blobs, 2, tmp_path if disk else None)
    for experts in ([0, 1], [0, 1], [0, 1]):
        both.compute(0, *request(experts), Reduction.PER_EXPERT)
    assert len(both.store.gpu.layer(0)) == 2
    failing(monkeypatch, error, 0)
    hidden, routing = request([0, 1, 2])
    got, _ = both.compute(0, hidden, routing, Reduction.PER_EXPERT)
    assert torch.equal(got, cpu.compute(0, hidden, routing, Reduction.PER_EXPERT)[0])
    gpu = both.store.gpu
    assert gpu.bytes_held == 0 and not gpu.layer(0)
    lost = isinstance(error, torch.AcceleratorError)
    assert gpu.idle is lost and ("The GPU failed (AcceleratorError: CUDA error)" in caplog.text) is lost
    assert ("The GPU's memory is full: experts take 0.00 GB" in caplog.text) is not lost


def test_half_of_the_experts_go_when_others_take_the_memory(blobs, monkeypatch):
    cpu, both = executor_of(blobs, 0), executor_of(blobs, 4)
    gpu = both.store.gpu
    for experts in ([0, 1], [2, 3], [0, 1], [2, 3], [0, 1]):
        both.compute(0, *request(experts), Reduction.PER_EXPERT)
    held = gpu.bytes_held
    assert gpu.layer(0).keys() == {0, 1, 2, 3}
    compute, left = GpuExperts.moe_layer, [1]

    def moe_layer(*arguments):
        if left.pop() if left else 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(*arguments)

    monkeypatch.setattr(GpuExperts, "moe_layer", moe_layer)
    hidden, routing = request([0, 1, 0, 2], 2)
    got, _ = both.compute(0, hidden, routing, Reduction.PER_EXPERT)
    torch.testing.assert_close(got, cpu.compute(0, hidden, routing, Reduction.PER_EXPERT)[0], rtol=1e-4, atol=1e-5)
    assert gpu.layer(0).keys() == {0, 1} and gpu.bytes_held == gpu.capacity_bytes == held // 2 and not gpu.idle


def test_an_expert_that_has_no_room_after_all_is_computed_by_the_cpu(blobs, monkeypatch):
    both = executor_of(blobs, 4)
    gpu = both.store.gpu
    both.compute(0, *request([0, 1]), Reduction.PER_EXPERT)
    full = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(GpuExperts, "load_blob", lambda *arguments: (_ for _ in ()).throw(full))
    for _ in range(2):
        both.compute(0, *request([0, 1]), Reduction.PER_EXPERT)
    assert len(gpu.layer(0)) == 1 and gpu.capacity_bytes == gpu.bytes_held


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("wrong", "In a trial of 1 tokens the GPU's results were 100% away from the CPU's."),
        ("broken", "Their first request on the GPU failed: RuntimeError: no kernel image is available."),
    ],
)
def test_experts_stay_on_the_cpu_when_a_trial_fails(blobs, monkeypatch, caplog, fault, sentence):
    def project(gpu, spec, x, tile, tiles, numbers, weights, out):
        if fault == "broken":
            raise RuntimeError("no kernel image is available.\nCompile with TORCH_USE_CUDA_DSA.")

    monkeypatch.setattr(GpuExperts, "project", project)
    both = executor_of(blobs, 2)
    both.store.prepare()
    both.compute(0, *request([0, 1]), Reduction.PER_EXPERT)
    assert both.store.gpu.idle and both.store.gpu.bytes_held == 0 and not both.store.gpu.break_even
    assert sentence in caplog.text
