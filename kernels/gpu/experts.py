"""Routed experts on a GPU: memory, tiles and launches around the kernels of `grouped.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..geometry import ExpertSpec
from ..ops import Reduction
from ..reference import post_norm
from . import grouped
from .from_blob import expert_sources
from .planes import ALIGNMENT, Planes, lay_out, planes

# Rows of a projection and columns of a step in one program: for one vector (wide loads), and for tensor cores.
ONE_VECTOR, MANY_VECTORS = (16, 256), (64, 64)
_SUM_BLOCK = 1024


@dataclass(frozen=True, slots=True, eq=False)
class GpuExpert:
    """One expert in a GPU's memory; `norm` is its norm's weight, f32 [hidden], if it has one."""

    spec: ExpertSpec
    memory: torch.Tensor  # uint8, aligned to 128
    norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where an expert's parts lie: its projections' planes and f32 biases, in bytes from its start."""

    up: Planes
    down: Planes
    up_at: int
    down_at: int
    up_bias: int
    down_bias: int
    nbytes: int


def _layout(spec: ExpertSpec) -> _Layout:
    up = planes(spec.format, spec.projected_size, spec.hidden_size)
    down = planes(spec.back_format, spec.hidden_size, spec.intermediate_size)
    sizes = [up.nbytes, down.nbytes]
    if spec.bias:
        sizes += [4 * spec.projected_size, 4 * spec.hidden_size]
    starts, end = [], 0
    for nbytes in sizes:
        starts.append(end)
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    biases = starts[2:] if spec.bias else [0, 0]
    return _Layout(up, down, starts[0], starts[1], biases[0], biases[1], end)


class GpuExperts:
    """Computes routed experts on one device. Calls are made from one thread."""

    def __init__(self, device: torch.device) -> None:
        """`device` is a GPU, or the CPU under TRITON_INTERPRET=1."""
        self.device = device
        self._layouts: dict[ExpertSpec, _Layout] = {}
        self._base = empty(ALIGNMENT, device)  # experts are addressed from here

    def nbytes(self, spec: ExpertSpec) -> int:
        """Bytes of GPU memory that one expert takes."""
        return self._layout(spec).nbytes

    def load(
        self, spec: ExpertSpec, up: Mapping[str, torch.Tensor], down: Mapping[str, torch.Tensor],
        floats: Mapping[str, torch.Tensor],
    ) -> GpuExpert:  # fmt: skip
        """Lays an expert out in the device's memory.

        `up` and `down` are sources as `planes.lay_out` takes them; `floats` has the f32 tensors `up_bias`,
        `down_bias`, `post_norm` that the spec names. Raises PlanesError, or torch's OutOfMemoryError.
        """
        place = self._layout(spec)
        memory = empty(place.nbytes, self.device)
        lay_out(spec.format, up, memory[place.up_at : place.up_at + place.up.nbytes])
        lay_out(spec.back_format, down, memory[place.down_at : place.down_at + place.down.nbytes])
        if spec.bias:
            for at, name in ((place.up_bias, "up_bias"), (place.down_bias, "down_bias")):
                raw = floats[name].float().contiguous().view(torch.uint8)
                memory[at : at + raw.numel()].copy_(raw)
        norm = floats["post_norm"].float().to(self.device) if spec.post_norm_eps is not None else None
        return GpuExpert(spec, memory, norm)

    def load_blob(self, spec: ExpertSpec, blob: torch.Tensor) -> GpuExpert:
        """Lays out an expert that lies in a node's memory: uint8 [spec.nbytes] on the CPU. Raises as `load` does."""
        return self.load(spec, *expert_sources(spec, blob))

    def moe_layer(
        self,
        spec: ExpertSpec,
        held: Mapping[int, GpuExpert],
        hidden: torch.Tensor,
        offsets: npt.NDArray[np.uint32],
        pair_experts: npt.NDArray[np.uint32],
        pair_weights: npt.NDArray[np.float32],
        reduction: Reduction,
    ) -> torch.Tensor:
        """As `ExpertOps.moe_layer`, for `hidden` on any device; the result is on this one, of hidden's dtype.

        All experts that are asked for are as `spec` says. Three launches: both projections over all tiles, and the
        sum. Raises KeyError(number) for an expert that is not held.
        """
        pairs = len(pair_experts)
        out = torch.zeros(pairs, spec.hidden_size, device=self.device)
        if pairs:
            x = hidden.to(self.device, torch.float32).contiguous()
            order = np.argsort(pair_experts, kind="stable")
            tile, tiles = self._tiles(pair_experts[order], held)
            token_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[order]
            numbers = self._to_device(np.stack([token_of, order]).astype(np.int64))
            weights = np.ones_like(pair_weights) if spec.post_norm_eps is not None else pair_weights[order]
            self.project(spec, x, tile, tiles, numbers, self._to_device(weights), out)
            if spec.post_norm_eps is not None:
                out = self._normalize(spec, held, pair_experts, out) * self._to_device(pair_weights)[:, None]
        if reduction is Reduction.PER_EXPERT:
            return out.to(hidden.dtype)
        sums = torch.empty(len(offsets) - 1, spec.hidden_size, device=self.device)
        if len(sums):
            self.add_up(out, self._to_device(offsets.astype(np.int64)), sums)
        return sums.to(hidden.dtype)

    def add_up(self, pairs: torch.Tensor, offsets: torch.Tensor, sums: torch.Tensor) -> None:
        """Adds each token's pairs in the order listed: f32 [P, H], int64 [T + 1] → `sums` f32 [T, H], all here."""
        grid = (-(-sums.shape[1] // _SUM_BLOCK), len(sums))
        grouped.sum_pairs[grid](pairs, offsets, sums, sums.shape[1], BLOCK=_SUM_BLOCK)

    def address(self, expert: GpuExpert) -> int:
        """Where an expert lies, for `tiles`: bytes from where all are addressed."""
        return expert.memory.data_ptr() - self._base.data_ptr()

    def project(
        self, spec: ExpertSpec, x: torch.Tensor, tile: int, tiles: torch.Tensor, numbers: torch.Tensor,
        weights: torch.Tensor, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Both projections of the pairs of `tiles` (see grouped.py), into `out` f32 [P, H] on the device."""
        place = self._layout(spec)
        middle = torch.empty(len(out), spec.intermediate_size, device=self.device)
        rows, step = ONE_VECTOR if tile == 1 else MANY_VECTORS
        limit = 0 if spec.limit is None else 2 if spec.limit_after_activation else 1
        common: dict[str, Any] = {"BIAS": spec.bias, "TILE": tile, "BLOCK_ROWS": rows, "BLOCK_K": step}
        grouped.up_projection[-(-spec.intermediate_size // rows), len(tiles)](
            self._base, tiles, numbers[0], x, middle, spec.hidden_size, spec.intermediate_size,
            place.up.columns, place.up_bias, *_starts(place.up, place.up_at), spec.alpha, spec.limit or 0.0,
            spec.up_offset, FMT=grouped.FORMATS.index(place.up.format), GATED=spec.gated, LIMIT=limit,
            ACTIVATION=grouped.ACTIVATIONS.index(spec.activation), **common,
        )  # fmt: skip
        grouped.down_projection[-(-spec.hidden_size // rows), len(tiles)](
            self._base, tiles, numbers[1], weights, middle, out, spec.hidden_size, spec.intermediate_size,
            place.down.columns, place.down_bias, *_starts(place.down, place.down_at),
            FMT=grouped.FORMATS.index(place.down.format), **common,
        )  # fmt: skip

    def _normalize(
        self, spec: ExpertSpec, held: Mapping[int, GpuExpert], experts: npt.NDArray[np.uint32], y: torch.Tensor
    ) -> torch.Tensor:
        norms = [held[number].norm for number in experts.tolist()]
        return post_norm(spec, {"post_norm": torch.stack([norm for norm in norms if norm is not None])}, y)

    def _tiles(self, experts: npt.NDArray[np.uint32], held: Mapping[int, GpuExpert]) -> tuple[int, torch.Tensor]:
        """The pairs' tiles for sorted `experts`: their largest size, and int64 [tiles, 3] (see `up_projection`)."""
        numbers, firsts, counts = np.unique(experts, return_index=True, return_counts=True)
        tile = 1 if counts.max() == 1 else 16 if counts.mean() <= 16 else 64
        rows: list[tuple[int, int, int]] = []
        for number, first, count in zip(numbers.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            address = self.address(held[number])
            rows += [(address, first + i, min(tile, count - i)) for i in range(0, count, tile)]
        return tile, self._to_device(np.array(rows, dtype=np.int64))

    def _layout(self, spec: ExpertSpec) -> _Layout:
        if spec not in self._layouts:
            self._layouts[spec] = _layout(spec)
        return self._layouts[spec]

    def _to_device(self, numbers: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.device, non_blocking=True)


def _starts(place: Planes, at: int) -> Sequence[int]:
    """Where the values start in an expert, and the other planes from there."""
    return (at + place.offsets[0], *place.offsets[1:])


def empty(nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes], aligned as kernels want weights."""
    memory = torch.empty(nbytes + ALIGNMENT - 1, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]
