"""A GPU's memory over the RAM: the experts that are used most, computed where they lie.

An expert that is in RAM only is computed there by the CPU when few tokens want it, and copied for the request when
many do; from how many on is measured (`measure_break_even`). Copies stay in RAM's tier as well, which is the page
cache's or the arena's: what a GPU drops is there at once.

The GPU's arithmetic is not the CPU's: both are within the formats' tolerance of the reference, not equal bit for bit.
A kind of expert comes here only after a trial beside the CPU (gpu_trial.py). A GPU whose memory others have taken
gives up half of its experts, one that fails all of them; the CPU goes on.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from types import MappingProxyType

import numpy as np
import torch

from moehive.kernels.geometry import ExpertId, ExpertSpec
from moehive.kernels.gpu.decode import DecodeLayer
from moehive.kernels.gpu.experts import GpuExpert, GpuExperts
from moehive.kernels.gpu.failures import why
from moehive.kernels.gpu.planes import PlanesError
from moehive.kernels.ops import ExpertOps, ExpertWeights, Reduction
from moehive.proto.tensors import Routing

from ..types import GpuFailed
from .gpu_trial import disagreement
from .parts import part_of
from .use import HALF_LIFE, used

log = logging.getLogger(__name__)

HEAD_ROOM_SHARE = 0.1  # of what is free on the GPU: for intermediate results and whoever else uses it
TRIED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NEVER = 1 << 30  # more tokens than a request has
HYSTERESIS = 1.0  # doublings by which an expert must be used more than the one whose place it takes
LOOK_EVERY = 32  # requests, for one that might make room: it takes a look at all
_NONE: Mapping[int, GpuExpert] = MappingProxyType({})


def free_bytes(device: torch.device) -> int:
    """Bytes of the GPU's memory that experts may take."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * (1 - HEAD_ROOM_SHARE))


class GpuTier:
    """`capacity_bytes` of a GPU's memory. Whoever computes holds `lock`."""

    def __init__(self, device: torch.device, capacity_bytes: int, cpu: ExpertOps) -> None:
        """`cpu` computes what is not on the GPU."""
        self._cpu = cpu
        self.capacity_bytes = capacity_bytes
        self.bytes_held = 0
        self.pinned: frozenset[ExpertId] = frozenset()  # come at their first use, and stay
        self.break_even: dict[ExpertSpec, int] = {}  # tokens of one expert from which it is copied for a request
        self._gpu = GpuExperts(device)
        self._held: dict[int, dict[int, GpuExpert]] = {}
        self._counts: dict[ExpertId, float] = {}
        self._decode: dict[tuple[ExpertSpec, int], DecodeLayer] = {}
        self._kinds: dict[ExpertSpec, bool] = {}  # that were tried: whether the GPU computes them
        self._failed = False
        self.lock = threading.RLock()  # what is on the GPU must not change under a request
        self._time = 0.0
        self._requests = 0

    @property
    def idle(self) -> bool:
        """Whether the CPU computes everything: the GPU has failed, or computes none of the kinds that were tried."""
        return self._failed or (bool(self._kinds) and not any(self._kinds.values()))

    def layer(self, layer: int) -> Mapping[int, GpuExpert]:
        """The experts of a layer that are on the GPU."""
        return self._held.get(layer, _NONE)

    def remove(self, expert: ExpertId) -> None:
        """This node holds an expert no more."""
        self._counts.pop(expert, None)
        with self.lock:
            if expert.expert in self._held.get(expert.layer, {}):
                self._drop(expert)

    def measure_break_even(self, weights: ExpertWeights) -> None:
        """Finds from how many tokens on copying an expert like this and computing it here beats the CPU.

        Once for each kind of expert; takes seconds, for which no request is computed.
        """
        spec = weights.spec
        with self.lock:
            if spec in self.break_even or not self._computes(weights):
                return
            try:
                with self._watched():
                    self.break_even[spec] = next((n for n in TRIED_TOKENS if self._copying_pays(weights, n)), NEVER)
            except GpuFailed:
                return
        if self.break_even[spec] == NEVER:
            log.info("An expert in %s in RAM is not copied to the GPU for a request: it never paid.", spec.format)
        else:
            tokens = self.break_even[spec]
            log.info("An expert in %s in RAM is copied to the GPU for %d tokens or more.", spec.format, tokens)

    def _copying_pays(self, weights: ExpertWeights, tokens: int) -> bool:
        """Whether copying an expert and computing `tokens` here is quicker than the CPU; the best of three each."""
        spec = weights.spec
        hidden = torch.zeros(tokens, spec.hidden_size)
        offsets = np.arange(tokens + 1, dtype=np.uint32)
        experts, factors = np.zeros(tokens, dtype=np.uint32), np.ones(tokens, dtype=np.float32)
        cpu = gpu = float("inf")
        for _ in range(3):  # the first call compiles
            start = perf_counter()
            self._cpu.moe_layer(spec, {0: weights}, hidden, offsets, experts, factors, Reduction.PER_EXPERT)
            middle = perf_counter()
            held = {0: self._gpu.load_blob(spec, weights.blob)}
            self._gpu.moe_layer(spec, held, hidden, offsets, experts, factors, Reduction.PER_EXPERT).cpu()
            end = perf_counter()
            cpu, gpu = min(cpu, middle - start), min(gpu, end - middle)
        return gpu < cpu

    def compute(
        self,
        layer: int,
        spec: ExpertSpec,
        in_ram: Mapping[int, ExpertWeights],
        hidden: torch.Tensor,
        routing: Routing,
    ) -> torch.Tensor:
        """All pairs of a request, weighted, f32 [pairs, hidden] on the CPU; both processors work at once.

        Raises KeyError(number) for an expert that is neither here nor in RAM, and GpuFailed, after which some experts
        or all are here no more.
        """
        numbers, tokens = np.unique(routing.experts, return_counts=True)
        held = dict(self.layer(layer))
        wanted = dict(zip(numbers.tolist(), tokens.tolist(), strict=True))
        copied = [n for n in wanted if n not in held and wanted[n] >= self.break_even.get(in_ram[n].spec, NEVER)]
        with self._watched():
            held |= {n: self._gpu.load_blob(in_ram[n].spec, in_ram[n].blob) for n in copied}
        here = np.isin(routing.experts, list(held))
        rows = torch.empty(len(routing.experts), spec.hidden_size)
        x = hidden.float()
        with self._watched():
            on_gpu = self._on_gpu(held, x, part_of(routing, here)) if here.any() else None
        if not here.all():  # while the GPU computes
            rest = part_of(routing, ~here)
            rows[torch.from_numpy(~here)] = self._cpu.moe_layer(
                spec, in_ram, x, rest.offsets, rest.experts, rest.weights, Reduction.PER_EXPERT
            )
        with self._watched():
            if on_gpu is not None:
                rows[torch.from_numpy(here)] = on_gpu.cpu()
            self._move_up(layer, in_ram, list(wanted))
        return rows

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Of what the GPU does: raises GpuFailed when it fails, and gives up experts."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.break_even = dict.fromkeys(self.break_even, NEVER)
            self._shrink(self.bytes_held // 2)
            raise GpuFailed(f"The GPU can't compute: {why(error)}.") from error
        except Exception as error:  # of torch, Triton or the driver: their kinds are many
            log.error("The GPU failed (%s): the CPU computes until this node is started again.", why(error))
            self._failed = True
            self._shrink(0)
            raise GpuFailed(f"The GPU failed: {why(error)}.") from error

    def _shrink(self, nbytes: int) -> None:
        """Experts take so many bytes at most from now on."""
        for expert in sorted(self._counts, key=lambda e: (e in self.pinned, self._counts[e])):
            if self.bytes_held <= nbytes:
                break
            if expert.expert in self.layer(expert.layer):
                self._drop(expert)
        self.capacity_bytes = nbytes
        if not self._failed:
            log.warning("The GPU's memory is full: experts take %.2f GB of it from now on.", nbytes / 1e9)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _drop(self, expert: ExpertId) -> None:
        self.bytes_held -= self._held[expert.layer].pop(expert.expert).memory.numel()

    def _on_gpu(self, held: Mapping[int, GpuExpert], x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """All pairs in f32 [pairs, hidden] there; a layer's experts may differ in their formats."""
        specs = [held[number].spec for number in routing.experts.tolist()]
        kinds = list(dict.fromkeys(specs))
        if len(kinds) == 1:
            return self._of_one_format(kinds[0], held, x, routing)
        rows = torch.empty(len(specs), x.shape[1], device=self._gpu.device)
        for kind in kinds:
            mine = np.array([spec == kind for spec in specs])
            places = torch.from_numpy(np.flatnonzero(mine)).to(rows.device, non_blocking=True)
            rows.index_copy_(0, places, self._of_one_format(kind, held, x, part_of(routing, mine)))
        return rows

    def _of_one_format(
        self, spec: ExpertSpec, held: Mapping[int, GpuExpert], x: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        offsets, experts, weights = routing
        if len(x) > 1 or spec.post_norm_eps is not None or len(set(experts.tolist())) < len(experts):
            return self._gpu.moe_layer(spec, held, x, offsets, experts, weights, Reduction.PER_EXPERT)
        key = spec, len(experts)
        if key not in self._decode:
            self._decode[key] = DecodeLayer(self._gpu, spec, len(experts))
        return self._decode[key](held, x, experts, weights, Reduction.PER_EXPERT)

    def _computes(self, weights: ExpertWeights) -> bool:
        """Whether experts like this are computed here; the first of its kind is tried."""
        spec = weights.spec
        if self._failed:
            return False
        if spec not in self._kinds:
            try:
                complaint = disagreement(self._gpu, self._cpu, weights)
            except PlanesError as error:
                complaint = str(error)
            if complaint is not None:
                log.warning("Experts of %s and %s stay on the CPU: %s", spec.format, spec.back_format, complaint)
            self._kinds[spec] = complaint is None
        return self._kinds[spec]

    def _move_up(self, layer: int, in_ram: Mapping[int, ExpertWeights], numbers: list[int]) -> None:
        """Counts the uses; a pinned expert of this request comes up, else that used most, if it is worth it."""
        self._time += 1 / (HALF_LIFE * max(1, len(self._held)))
        for number in numbers:
            expert = ExpertId(layer, number)
            self._counts[expert] = used(self._counts.get(expert, float("-inf")), self._time)
        there = self.layer(layer)
        below = [n for n in numbers if n not in there and n in in_ram and self._computes(in_ram[n])]
        if not below:
            return
        best = max(below, key=lambda n: (ExpertId(layer, n) in self.pinned, self._counts[ExpertId(layer, n)]))
        spec, must = in_ram[best].spec, ExpertId(layer, best) in self.pinned
        missing = self.bytes_held + self._gpu.nbytes(spec) - self.capacity_bytes
        self._requests += 1
        if not must and missing > 0 and self._requests % LOOK_EVERY:
            return
        leaving = self._least_used(missing, float("inf") if must else self._counts[ExpertId(layer, best)])
        if leaving is None:
            return
        for gone in leaving:
            self._drop(gone)
        try:
            came = self._gpu.load_blob(spec, in_ram[best].blob)
        except torch.OutOfMemoryError:  # the request itself is computed
            self._shrink(self.bytes_held)
            return
        self._held.setdefault(layer, {})[best] = came
        self.bytes_held += came.memory.numel()

    def _least_used(self, nbytes: int, below: float) -> list[ExpertId] | None:
        """The experts that make room for `nbytes`; None if they don't, or if one is used as much as `below`."""
        may_go = (ExpertId(of, number) for of, experts in self._held.items() for number in experts)
        leaving: list[ExpertId] = []
        for expert in sorted((e for e in may_go if e not in self.pinned), key=self._counts.__getitem__):
            if nbytes <= 0:
                break
            if self._counts[expert] + HYSTERESIS > below:
                return None
            leaving.append(expert)
            nbytes -= self._held[expert.layer][expert.expert].memory.numel()
        return leaving if nbytes <= 0 else None
