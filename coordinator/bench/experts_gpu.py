"""`moehive bench experts` on a GPU: what part of its memory's bandwidth the Triton kernels reach.

One token goes to eight experts that lie in the GPU's memory, once as launches and once as the graph that was recorded
of them, so that it shows what recording is worth; more tokens go to one expert. The rest is as on the CPU
(experts.py): a set of experts far larger than the caches, a plain read of memory in turns with the calls, torch's
bf16 products of the same shape before them.
"""

import statistics
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import get_args

import torch

from moehive.kernels.geometry import ExpertSpec, Format
from moehive.kernels.gpu.decode import DecodeLayer
from moehive.kernels.gpu.experts import GpuExpert, GpuExperts
from moehive.kernels.gpu.planes import BLOCK_COLUMNS
from moehive.kernels.ops import Reduction

from .experts import TOP_K, ExpertsRow, Extent, random_expert, torch_products, walk
from .timing import device_seconds_of

FORMATS: tuple[Format, ...] = tuple(fmt for fmt in get_args(Format) if fmt in BLOCK_COLUMNS)
GRAPH = "triton, graph"


def measure_gpu_experts(extent: Extent, device: torch.device) -> list[ExpertsRow]:
    """Rows of all formats that a GPU computes, with 0 threads; `device` is a GPU, or the CPU in the interpreter."""
    memory = torch.ones(extent.read_bytes // 4, device=device)
    rows: list[ExpertsRow] = []
    for shape in extent.shapes:
        for fmt in FORMATS:
            spec = ExpertSpec(
                hidden_size=shape.hidden, intermediate_size=shape.intermediate, activation="silu", format=fmt
            )
            gpu = GpuExperts(device)
            held = _held(gpu, spec, max(2 * TOP_K, extent.set_bytes // gpu.nbytes(spec)))
            for batch in extent.batches:
                used = TOP_K if batch == 1 else 1
                ways = {"triton": _launches(gpu, spec, held, batch, used)}
                if batch == 1:
                    ways[GRAPH] = _graph(gpu, spec, held, used)
                for kernel, call in ways.items():
                    rows.append(
                        _measure(call, kernel, gpu, spec, len(held), memory, shape.name, batch, extent.repeats)
                    )
    return rows


def _measure(
    call: Callable[[], object],
    kernel: str,
    gpu: GpuExperts,
    spec: ExpertSpec,
    experts: int,
    memory: torch.Tensor,
    shape: str,
    batch: int,
    repeats: int,
) -> ExpertsRow:
    used = TOP_K if batch == 1 else 1
    products = torch_products(spec, batch, used, gpu.device)
    for warm in (products, call, memory.sum):  # compiles, records
        warm()
    calls = max(1, experts // used)
    torch_seconds = statistics.median(device_seconds_of(products, calls, gpu.device) for _ in range(repeats)) / calls
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        times[0].append(device_seconds_of(call, calls, gpu.device) / calls)
        times[1].append(device_seconds_of(memory.sum, 1, gpu.device))
    seconds, read_seconds = (statistics.median(series) for series in times)
    nbytes = used * gpu.nbytes(spec)
    bandwidth, read_bandwidth = nbytes / seconds, memory.nbytes / read_seconds
    return ExpertsRow(
        format=spec.format,
        batch=batch,
        kernel=kernel,
        threads=0,
        shape=shape,
        bytes=nbytes,
        seconds=seconds,
        bandwidth=bandwidth,
        read_bandwidth=read_bandwidth,
        ratio=bandwidth / read_bandwidth,
        torch_seconds=torch_seconds,
    )


def _launches(
    gpu: GpuExperts, spec: ExpertSpec, held: Sequence[GpuExpert], batch: int, used: int
) -> Callable[[], torch.Tensor]:
    hidden, numbered = torch.randn(batch, spec.hidden_size, device=gpu.device), dict(enumerate(held))
    following = cycle(walk(len(held), used, batch))
    return lambda: gpu.moe_layer(spec, numbered, hidden, *next(following), Reduction.PARTIAL_SUM)


def _graph(gpu: GpuExperts, spec: ExpertSpec, held: Sequence[GpuExpert], used: int) -> Callable[[], torch.Tensor]:
    hidden, numbered = torch.randn(1, spec.hidden_size, device=gpu.device), dict(enumerate(held))
    following, layer = cycle(walk(len(held), used, 1)), DecodeLayer(gpu, spec, used)

    def call() -> torch.Tensor:
        routing = next(following)
        return layer(numbered, hidden, routing.experts, routing.weights, Reduction.PARTIAL_SUM)

    return call


def _held(gpu: GpuExperts, spec: ExpertSpec, count: int) -> list[GpuExpert]:
    """Experts of random weights, each in a place of its own in the GPU's memory."""
    blob = random_expert(spec)
    return [gpu.load_blob(spec, blob) for _ in range(count)]
