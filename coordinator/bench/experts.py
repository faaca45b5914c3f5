"""`moehive bench experts`: the expert MLP of every format beside the machine's own limits, measured in one run.

One token goes to eight experts, as in a node's part of a layer, from a request's bytes to its reply's as a node
answers it; more tokens go to one. Call after call walks over a set of experts far larger than the caches, in mapped
files, as a node has them: their pages lie side by side more often than other memory's, and are read quicker.
Alternating with the calls, as many threads read plain memory. Before, torch multiplies the same tokens with bf16
weights of the same shape: not in turns with them, since its threads go on spinning for some time after their work.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch.nn import functional as F

from moehive.kernels.answer import Answerer
from moehive.kernels.blob import empty_blob, encode_tensor
from moehive.kernels.formats.blocks import BLOCK_FORMATS
from moehive.kernels.formats.file_rows import pack_file_rows
from moehive.kernels.geometry import ExpertSpec, Format
from moehive.kernels.library import NativeLibraryError
from moehive.kernels.machine import cores
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction, load_expert
from moehive.proto import experts_pb2 as pb
from moehive.proto.bounds import MAX_CHUNK_BYTES
from moehive.proto.tensors import Routing, write_head, write_routing
from moehive.proto.wire.windows import Times

from ..estimate.geometries import TensorShape
from .random_blocks import write_tensor
from .timing import read_seconds, seconds_of, torch_threads

TOP_K = 8
_CPU = torch.device("cpu")
_TORCH_SET_BYTES = 256 << 20
_TORCH_SPINS = 0.1  # seconds after its work, at most


class Shape(NamedTuple):
    """Hidden and intermediate size of one expert."""

    name: str
    hidden: int
    intermediate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is measured."""

    shapes: tuple[Shape, ...]
    batches: tuple[int, ...]  # tokens in a call
    set_bytes: int  # of the experts of one shape and format
    read_bytes: int  # of the plain memory that is read beside them
    repeats: int


_SHAPES = (Shape("qwen3.5-35b", 2048, 512), Shape("qwen3.5-397b", 4096, 1024))
_READ_BYTES = 512 << 20  # the largest last-level caches have about as much
FULL = Extent(shapes=_SHAPES, batches=(1, 8, 64, 512), set_bytes=512 << 20, read_bytes=_READ_BYTES, repeats=7)
QUICK = Extent(shapes=_SHAPES[:1], batches=(1, 64), set_bytes=128 << 20, read_bytes=_READ_BYTES, repeats=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsRow:
    """One measurement. `batch` tokens in a call, with eight experts if it is 1, else all with the same one.

    `threads` of the CPU, or 0: a GPU (experts_gpu.py). `bytes` of weights that a call reads; `seconds` a call takes;
    `bandwidth` and `read_bandwidth` in bytes a second, of the call and of a plain read in the same run; `ratio` the
    first by the second; `torch_seconds` the time of torch's bf16 products with the same number of tokens and experts.
    """

    format: str
    batch: int
    kernel: str
    threads: int
    shape: str
    bytes: int
    seconds: float
    bandwidth: float
    read_bandwidth: float
    ratio: float
    torch_seconds: float


def measure_experts(extent: Extent) -> list[ExpertsRow]:
    """All formats, one thread and all. Raises NativeLibraryError without the native library."""
    threads = (1, cores()) if cores() > 1 else (1,)
    memory = torch.ones(extent.read_bytes, dtype=torch.uint8)
    rows: list[ExpertsRow] = []
    for shape in extent.shapes:
        for fmt in get_args(Format):
            spec = ExpertSpec(
                hidden_size=shape.hidden, intermediate_size=shape.intermediate, activation="silu", format=fmt
            )
            with TemporaryDirectory(prefix="moehive-") as folder:
                experts = _held(spec, max(2 * TOP_K, extent.set_bytes // spec.nbytes), Path(folder))
            for count in threads:
                with torch_threads(count):
                    ops = ExpertOps(count)
                    for batch in extent.batches:
                        rows.append(_measure(ops, spec, experts, memory, shape.name, batch, count, extent.repeats))
            del experts
    return rows


def _measure(
    ops: ExpertOps,
    spec: ExpertSpec,
    experts: list[ExpertWeights],
    memory: torch.Tensor,
    shape: str,
    batch: int,
    threads: int,
    repeats: int,
) -> ExpertsRow:
    used = TOP_K if batch == 1 else 1
    call = (_answers if batch == 1 else _layers)(ops, spec, experts, batch, used)
    products = torch_products(spec, batch, used)
    # At batch 1 the whole set is walked once in each repetition, so that one is long enough to compare with a read.
    calls = max(1, len(experts) // used) if batch == 1 else 1
    products()
    # Torch takes seconds for many tokens.
    torch_seconds = statistics.median(seconds_of(products, 1) for _ in range(repeats if batch < 64 else 3))
    time.sleep(_TORCH_SPINS)
    call()
    slice_bytes = min(len(memory), max(64 << 20, calls * used * spec.nbytes))
    # One token's calls and reads take turns, many tokens' calls follow each other, as torch's do.
    turns = repeats if batch == 1 else 1
    times: list[float] = []
    reads: list[float] = []
    for _ in range(turns):
        times += [seconds_of(call, calls) for _ in range(repeats // turns)]
        reads += [read_seconds(memory[:slice_bytes], threads) for _ in range(repeats // turns)]
    seconds, of_read = statistics.median(times), statistics.median(reads)
    nbytes = used * spec.nbytes
    bandwidth, read_bandwidth = nbytes / (seconds / calls), slice_bytes / of_read
    return ExpertsRow(
        format=spec.format,
        batch=batch,
        kernel=ops.kernel,
        threads=threads,
        shape=shape,
        bytes=nbytes,
        seconds=seconds / calls,
        bandwidth=bandwidth,
        read_bandwidth=read_bandwidth,
        ratio=bandwidth / read_bandwidth,
        torch_seconds=torch_seconds,
    )


def _answers(
    ops: ExpertOps, spec: ExpertSpec, experts: list[ExpertWeights], batch: int, used: int
) -> Callable[[], object]:
    """Answers the next of some requests, as a node does."""
    if ops.native is None:
        raise NativeLibraryError("Without the native library there is nothing to measure; see the log.")
    answerer = Answerer(ops.native, most_bytes=1 << 30, most_pairs=1 << 20, most_work=1 << 60)
    answerer.begin(1, 0)
    answerer.use(0, spec, dict(enumerate(experts)), len(experts))
    request = pb.ComputeRequest(id=1, reduction=pb.REDUCTION_PARTIAL_SUM)
    request.hidden_states = bytes(write_head(request, torch.randn(batch, spec.hidden_size)))
    messages = []
    for routing in walk(len(experts), used, batch):
        write_routing(request, routing)
        messages.append(request.SerializeToString())
    following, times = cycle(messages), Times()

    def answer() -> None:
        if answerer.answer(next(following), ctypes.addressof(times)) is None:
            raise AssertionError("a request is not answered")

    return answer


def _layers(
    ops: ExpertOps, spec: ExpertSpec, experts: list[ExpertWeights], batch: int, used: int
) -> Callable[[], object]:
    """Computes the next of some layers' pairs."""
    hidden, held = torch.randn(batch, spec.hidden_size), dict(enumerate(experts))
    following = cycle(walk(len(experts), used, batch))

    def layer() -> torch.Tensor:
        return ops.moe_layer(spec, held, hidden, *next(following), Reduction.PARTIAL_SUM)

    return layer


def walk(experts: int, used: int, batch: int) -> list[Routing]:
    """The pairs of call after call, each in turn, so that an expert comes again only after all others."""
    offsets = np.arange(batch + 1, dtype=np.uint32) * np.uint32(used)
    weights = np.full(batch * used, 1 / used, dtype=np.float32)
    starts = range(0, experts - used + 1, used)
    return [Routing(offsets, np.tile(np.arange(at, at + used, dtype=np.uint32), batch), weights) for at in starts]


def torch_products(spec: ExpertSpec, batch: int, used: int, device: torch.device = _CPU) -> Callable[[], None]:
    """The same experts in torch, bf16, the products alone, of a set that the caches do not hold either."""
    one = 2 * spec.hidden_size * (spec.projected_size + spec.intermediate_size)  # bytes
    sets = max(2, _TORCH_SET_BYTES // (one * used))
    numbers = partial(torch.randn, device=device)
    up = numbers(spec.projected_size, spec.hidden_size).bfloat16().repeat(sets * used, 1, 1)
    down = numbers(spec.hidden_size, spec.intermediate_size).bfloat16().repeat(sets * used, 1, 1)
    x = numbers(batch, spec.hidden_size).bfloat16()
    at = 0

    def run() -> None:
        nonlocal at
        for expert in range(at, at + used):
            gate, value = F.linear(x, up[expert]).chunk(2, dim=-1)
            F.linear(F.silu(gate) * value, down[expert])
        at = (at + used) % (sets * used)

    return run


def random_expert(spec: ExpertSpec) -> torch.Tensor:
    """An expert of random weights: uint8 [spec.nbytes]."""
    blob = empty_blob(spec.nbytes).zero_()
    for place in spec.tensors:
        out = blob[place.offset : place.offset + place.nbytes]
        if place.format not in BLOCK_FORMATS:
            encode_tensor(place, torch.randn(place.shape) / place.shape[-1] ** 0.5, out)
            continue
        shape = (place.shape[0] // place.matrices, place.shape[1])
        for matrix in out.chunk(place.matrices):
            file = BytesIO()
            write_tensor(file, TensorShape("", shape, matrix=True), place.format, np.random.default_rng(0))
            rows = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).view(shape[0], -1)
            pack_file_rows(place.format, rows, shape[1], matrix)
    return blob


def _held(spec: ExpertSpec, count: int, folder: Path) -> list[ExpertWeights]:
    """Experts as a node has what it has fetched: files written chunk by chunk, mapped. They may be deleted then."""
    content, experts = random_expert(spec).numpy().data, []
    for number in range(count):
        path = folder / str(number)
        with path.open("wb", buffering=0) as file:
            for start in range(0, spec.nbytes, MAX_CHUNK_BYTES):
                file.write(content[start : start + MAX_CHUNK_BYTES])
        blob = torch.from_file(str(path), shared=False, size=spec.nbytes, dtype=torch.uint8)
        experts.append(load_expert(spec, blob))
    return experts
