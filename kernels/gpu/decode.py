"""One token's experts on a GPU as a CUDA graph: three launches and their set-up become one.

A launch costs some 5 µs of the CPU's time and the arrays of a call some 10 more, which is as long as a small layer
computes. Shapes of decoding never change, so the launches are recorded once for a number of experts; a call fills the
buffers that they read. Without CUDA the launches are made anew each time, with the same buffers.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from ..geometry import ExpertSpec
from ..ops import Reduction
from .experts import GpuExpert, GpuExperts
from .graphs import Recorder


class DecodeLayer:
    """`GpuExperts.moe_layer` for one token whose experts differ, of a spec without a norm; from one thread."""

    def __init__(self, gpu: GpuExperts, spec: ExpertSpec, pairs: int) -> None:
        self._gpu = gpu
        self._spec = spec
        device = gpu.device
        self._x = torch.zeros(1, spec.hidden_size, device=device)
        self._tiles = torch.zeros(pairs, 3, dtype=torch.int64, device=device)
        self._numbers = torch.stack([torch.zeros(pairs, dtype=torch.int64), torch.arange(pairs)]).to(device)
        self._weights = torch.zeros(pairs, device=device)
        self._out = torch.zeros(pairs, spec.hidden_size, device=device)
        self._sum = torch.zeros(1, spec.hidden_size, device=device)
        self._offsets = torch.tensor([0, pairs], device=device)
        self._recorder = Recorder(device) if device.type == "cuda" else None
        self._compiled = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self,
        held: Mapping[int, GpuExpert],
        hidden: torch.Tensor,
        experts: npt.NDArray[np.uint32],
        weights: npt.NDArray[np.float32],
        reduction: Reduction,
    ) -> torch.Tensor:
        """`hidden` [1, hidden] on any device; as `moe_layer`, f32 on the GPU, good until the next call."""
        self._x.copy_(hidden, non_blocking=True)
        self._weights.copy_(torch.from_numpy(weights), non_blocking=True)
        tiles = np.array([(self._gpu.address(held[n]), i, 1) for i, n in enumerate(experts.tolist())], dtype=np.int64)
        self._tiles.copy_(torch.from_numpy(tiles), non_blocking=True)
        if self._recorder is None or not self._compiled:
            self._launch()
            self._compiled = True  # kernels must not be compiled while they are recorded
        else:
            if self._graph is None:
                self._graph = self._recorder.record(self._launch)
            self._graph.replay()
        return self._out if reduction is Reduction.PER_EXPERT else self._sum

    def _launch(self) -> None:
        self._gpu.project(self._spec, self._x, 1, self._tiles, self._numbers, self._weights, self._out)
        self._gpu.add_up(self._out, self._offsets, self._sum)
