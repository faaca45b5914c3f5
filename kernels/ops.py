"""The one door to expert arithmetic: picks an implementation once and says in the log what it picked and why.

An expert with few tokens in a call is computed by the native library, which streams the stored weights once; one
with many by torch's matrix products. The choice looks at nothing but that number of tokens, so a (token, expert)
pair comes out the same on whichever node the expert lives.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch

from .blob import tensor_views
from .geometry import ExpertSpec, GeometryError
from .reference import expert_forward

log = logging.getLogger(__name__)


class Reduction(Enum):
    """What a layer's call returns: one weighted sum for each token, or one weighted output for each pair."""

    PARTIAL_SUM = "partial_sum"
    PER_EXPERT = "per_expert"


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """One expert ready to compute. Holds its blob, and views of it; never a copy of the weights."""

    spec: ExpertSpec
    blob: torch.Tensor  # uint8 [spec.nbytes], aligned to 64
    tensors: dict[str, torch.Tensor]  # the blob's tensors in stored form
    address: int  # of the blob's first byte


def load_expert(spec: ExpertSpec, blob: torch.Tensor) -> ExpertWeights:
    """Makes `blob` (uint8 [spec.nbytes], CPU, aligned to 64; see `blob.empty_blob`) ready to compute, in place.

    The caller must not write to the blob afterwards. Raises GeometryError for a blob that is not like that.
    """
    return ExpertWeights(spec, blob, tensor_views(spec, blob), blob.data_ptr())


class ExpertOps:
    """Computes routed experts on this machine's CPU. Safe to call from several threads, which then wait in line."""

    kernel: str  # what computes an expert with few tokens: "avx512", "avx2", "neon", "scalar" or "torch"

    def __init__(self, threads: int) -> None:
        """`threads`: how many cores one call may use, at least 1."""
        self.kernel = "torch"
        log.info("Experts are computed by torch.")

    def moe_layer(
        self,
        spec: ExpertSpec,
        held: Mapping[int, ExpertWeights],
        hidden: torch.Tensor,
        offsets: npt.NDArray[np.uint32],
        pair_experts: npt.NDArray[np.uint32],
        pair_weights: npt.NDArray[np.float32],
        reduction: Reduction,
    ) -> torch.Tensor:
        """Runs one layer's (token, expert) pairs.

        `hidden` [T, H] f32 or bf16. Token t has the pairs offsets[t] to offsets[t + 1] (`offsets` [T + 1], from
        0 to P); `pair_experts` [P] are expert numbers, `pair_weights` [P] factors of their outputs. Returns
        [T, H] (PARTIAL_SUM) or [P, H] (PER_EXPERT) of hidden's dtype: all arithmetic is f32, a token's pairs are
        added in the order listed, and the result is rounded once. Raises KeyError(number) for an expert that is
        not in `held`, GeometryError for shapes that do not fit together.
        """
        _check(spec, hidden, offsets, pair_experts, pair_weights)
        for number in set(pair_experts.tolist()):
            if held[number].spec != spec:
                raise GeometryError(f"Expert {number} was loaded with another description than the layer's.")
        x = hidden.float()
        tokens = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        pairs = torch.empty(len(pair_experts), spec.hidden_size)
        for number in np.unique(pair_experts).tolist():
            rows = np.flatnonzero(pair_experts == number)
            y = expert_forward(spec, held[number].tensors, x[torch.from_numpy(tokens[rows])])
            index = torch.from_numpy(rows)
            pairs[index] = y * torch.from_numpy(pair_weights)[index, None]
        if reduction is Reduction.PER_EXPERT:
            return pairs.to(hidden.dtype)
        return _sum_pairs(pairs, offsets).to(hidden.dtype)


def _sum_pairs(pairs: torch.Tensor, offsets: npt.NDArray[np.uint32]) -> torch.Tensor:
    """Adds each token's pairs in the order listed: pairs f32 [P, H] → f32 [T, H]."""
    starts = offsets.astype(np.int64)
    counts = np.diff(starts)
    sums = torch.zeros(len(counts), pairs.shape[1])
    for place in range(int(counts.max(initial=0))):
        tokens = np.flatnonzero(counts > place)
        sums[torch.from_numpy(tokens)] += pairs[torch.from_numpy(starts[tokens] + place)]
    return sums


def _check(
    spec: ExpertSpec,
    hidden: torch.Tensor,
    offsets: npt.NDArray[np.uint32],
    pair_experts: npt.NDArray[np.uint32],
    pair_weights: npt.NDArray[np.float32],
) -> None:
    """Raises GeometryError if a layer's inputs do not fit together."""
    if hidden.dim() != 2 or hidden.shape[1] != spec.hidden_size:
        raise GeometryError(f"Hidden states must be [tokens, {spec.hidden_size}], not {list(hidden.shape)}.")
    if hidden.dtype not in (torch.float32, torch.bfloat16) or hidden.device.type != "cpu":
        raise GeometryError(f"Hidden states must be f32 or bf16 on the CPU, not {hidden.dtype} on {hidden.device}.")
    if offsets.dtype != np.uint32 or pair_experts.dtype != np.uint32 or pair_weights.dtype != np.float32:
        raise GeometryError("Offsets and expert numbers must be of type uint32, weights of type float32.")
    if pair_experts.ndim != 1 or pair_experts.shape != pair_weights.shape:
        raise GeometryError(
            f"Every pair needs one expert and one weight; here are {pair_experts.shape} and {pair_weights.shape}."
        )
    if offsets.shape != (len(hidden) + 1,) or offsets[0] != 0 or offsets[-1] != len(pair_experts):
        raise GeometryError(
            f"The offsets of {len(hidden)} tokens must be {len(hidden) + 1} numbers from 0 to {len(pair_experts)}."
        )
    if (offsets[1:] < offsets[:-1]).any():
        raise GeometryError("The offsets of tokens must not fall.")
