"""`moehive bench experts` on a GPU, in small: in the interpreter where there is none."""

import pytest
import torch

from moehive.coordinator.bench import experts_gpu
from moehive.coordinator.bench.experts import Extent, Shape
from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.gpu.experts import GpuExperts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_there_is_a_row_for_each_batch_and_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_gpu, "FORMATS", ("q4_0",))
    monkeypatch.setattr(experts_gpu, "TOP_K", 2)  # the interpreter takes seconds for eight
    extent = Extent(shapes=(Shape("small", 64, 32),), batches=(1, 3), set_bytes=1, read_bytes=1 << 16, repeats=1)
    rows = experts_gpu.measure_gpu_experts(extent, DEVICE)
    cases = [(row.format, row.batch, row.kernel) for row in rows]
    ways = [(1, "triton"), (1, experts_gpu.GRAPH), (3, "triton")]
    assert cases == [("q4_0", *way) for way in ways]
    for row in rows:
        assert row.threads == 0 and min(row.seconds, row.torch_seconds, row.read_bandwidth) > 0
        spec = ExpertSpec(hidden_size=64, intermediate_size=32, activation="silu", format=row.format)
        assert row.bytes == GpuExperts(DEVICE).nbytes(spec) * (2 if row.batch == 1 else 1)
        assert row.bandwidth == pytest.approx(row.bytes / row.seconds)
        assert row.ratio == pytest.approx(row.bandwidth / row.read_bandwidth)
