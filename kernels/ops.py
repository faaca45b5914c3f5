"""The one door to expert arithmetic: picks an implementation once and says in the log what it picked and why.

An expert is computed by the native library; one in a plain format with many tokens in a call by torch's products,
unless it is in bf16 and the processor multiplies that. On processors of one kind the choice looks at nothing but the
format and that number of tokens, so a (token, expert) pair comes out the same on whichever node the expert lives.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch

from . import dense
from .blob import check_blob, tensor_views
from .geometry import ExpertSpec, GeometryError
from .library import NativeLibraryError
from .native import NativeExperts, kernels

log = logging.getLogger(__name__)

# A plain expert with more tokens than this in one call is computed by torch. Measured on one Zen 3 core (AVX2),
# hidden 2048, intermediate 512, best of 12, native / torch in ms: bf16 16 tokens 2.2 / 3.9, 32 4.0 / 4.8,
# 48 5.9 / 6.3, 64 7.9 / 6.9, 128 17 / 13; f32 8 tokens 1.8 / 1.9, 16 3.1 / 2.9, 32 9.4 / 5.9.
FEW_TOKENS = 32

_DTYPES = (np.dtype(np.uint32), np.dtype(np.uint32), np.dtype(np.float32))  # of offsets, expert numbers, weights


class Reduction(Enum):
    """What a layer's call returns: one weighted sum for each token, or one weighted output for each pair."""

    PARTIAL_SUM = "partial_sum"
    PER_EXPERT = "per_expert"


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """One expert ready to compute. Holds its blob; never a copy of the weights."""

    spec: ExpertSpec
    blob: torch.Tensor  # uint8 [spec.nbytes], aligned to 64
    address: int  # of the blob's first byte

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of the blob's tensors in stored form, made anew: few who compute need them."""
        return tensor_views(self.spec, self.blob)


def load_expert(spec: ExpertSpec, blob: torch.Tensor) -> ExpertWeights:
    """Makes `blob` (uint8 [spec.nbytes], CPU, aligned to 64; see `blob.empty_blob`) ready to compute, in place.

    The caller must not write to the blob afterwards. Raises GeometryError for a blob that is not like that.
    """
    check_blob(spec, blob)
    return ExpertWeights(spec, blob, blob.data_ptr())


class ExpertOps:
    """Computes routed experts on this machine's CPU. Safe to call from several threads, which then wait in line."""

    # Of the native library "avx512_bf16", "avx512_vnni", "avx512", "avx2", "neon" or "scalar"; without it "torch".
    kernel: str

    def __init__(self, threads: int) -> None:
        """`threads`: how many cores the native library may use, at least 1. Torch's are torch's own setting."""
        self._native: NativeExperts | None = None
        try:
            usable = kernels()
            self._native = NativeExperts(usable[0], threads)
        except NativeLibraryError as error:
            self.kernel = "torch"
            log.warning("Torch computes all experts, slower for few tokens, because: %s", error)
            return
        self.kernel = usable[0]
        self._by_torch = dense.quicker_with_many(self.kernel)
        log.info(
            "Experts are computed by the native kernel %s with %d threads (this processor can run %s; the first is "
            "the fastest), those in %s with more than %d tokens in a call by torch.",
            self.kernel,
            threads,
            ", ".join(usable),
            " or ".join(self._by_torch),
            FEW_TOKENS,
        )

    def moe_layer(
        self,
        spec: ExpertSpec,
        held: Mapping[int, ExpertWeights],
        hidden: torch.Tensor,
        offsets: npt.NDArray[np.uint32],
        pair_experts: npt.NDArray[np.uint32],
        pair_weights: npt.NDArray[np.float32],
        reduction: Reduction,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Runs one layer's (token, expert) pairs.

        `hidden` [T, H] f32 or bf16. Token t has the pairs offsets[t] to offsets[t + 1] (`offsets` [T + 1], from
        0 to P); `pair_experts` [P] are expert numbers, `pair_weights` [P] factors of their outputs. Returns
        [T, H] (PARTIAL_SUM) or [P, H] (PER_EXPERT) of hidden's dtype: all arithmetic is f32, a token's pairs are
        added in the order listed, and the result is rounded once. With `in_place` it may take the memory of `hidden`,
        which nobody wants any more: of 512 tokens of a large model these are 15 MB. Raises KeyError(number) for an
        expert that is not in `held`, GeometryError for shapes that do not fit together.
        """
        _check(spec, hidden, offsets, pair_experts, pair_weights)
        numbers: list[int] = pair_experts.tolist()
        # With so few pairs no expert has more tokens: the case of decoding.
        if self._native is not None and (len(numbers) <= FEW_TOKENS or not self._plain(spec)):
            experts = [held[number] for number in numbers]
            if all(expert.spec is spec for expert in experts):
                blobs = [expert.address for expert in experts]
                added = reduction is Reduction.PARTIAL_SUM
                return self._native.layer(spec, hidden.contiguous(), offsets, blobs, pair_weights, added, in_place)
        used = {number: held[number] for number in set(numbers)}
        kinds = {id(expert.spec): expert.spec for expert in used.values()}  # experts may differ in their formats
        for kind in kinds.values():
            if kind is not spec and replace(kind, format=spec.format, down_format=spec.down_format) != spec:
                raise GeometryError("An expert was loaded with another description than the layer's.")
        pairs = torch.empty(len(numbers), spec.hidden_size)
        self.write_pairs(used, hidden.float().contiguous(), offsets, pair_experts, pair_weights, pairs)
        if reduction is Reduction.PER_EXPERT:
            return pairs.to(hidden.dtype)
        return self.sum_pairs(pairs, offsets).to(hidden.dtype)

    def write_pairs(
        self,
        held: Mapping[int, ExpertWeights],
        x: torch.Tensor,
        offsets: npt.NDArray[np.uint32],
        pair_experts: npt.NDArray[np.uint32],
        pair_weights: npt.NDArray[np.float32],
        pairs: torch.Tensor,
    ) -> None:
        """Writes what `moe_layer` gives for the pairs whose experts are in `held`, and leaves the others alone.

        `x` f32 [T, H] and `pairs` f32 [P, H], contiguous; the rest as `moe_layer` takes it. A layer whose experts
        come by and by is computed like this, with the same bits as at once.
        """
        numbers: list[int] = pair_experts.tolist()
        used = {number: held[number] for number in set(numbers) if number in held}
        many = self._many(numbers, used)
        if self._native is not None and len(many) < len(used):
            few = {number: expert for number, expert in used.items() if number not in many}
            for kind in {id(expert.spec): expert.spec for expert in few.values()}.values():
                addresses = [few[n].address if n in few and few[n].spec is kind else 0 for n in numbers]
                self._native.pairs(kind, x, offsets, np.array(addresses, dtype=np.uint64), pair_weights, pairs)
        if many:
            token_of = np.repeat(np.arange(len(x)), np.diff(offsets))
            factors = torch.from_numpy(pair_weights).unsqueeze(1)
            for number in sorted(many):
                places = np.flatnonzero(pair_experts == number)
                y = dense.expert_forward(
                    used[number].spec, used[number].tensors, x[torch.from_numpy(token_of[places])]
                )
                rows = torch.from_numpy(places)
                pairs[rows] = y * factors[rows]

    @property
    def native(self) -> NativeExperts | None:
        """The native library, where there is one."""
        return self._native

    def sum_pairs(self, pairs: torch.Tensor, offsets: npt.NDArray[np.uint32]) -> torch.Tensor:
        """Adds each token's pairs in the order listed, as `moe_layer` does: f32 [P, H] → f32 [T, H]."""
        return _sum_pairs(pairs, offsets) if self._native is None else self._native.sum_pairs(pairs, offsets)

    def _many(self, numbers: list[int], used: Mapping[int, ExpertWeights]) -> set[int]:
        """The experts that torch computes: plain ones with many tokens, or all without the native library."""
        if self._native is None:
            return set(used)
        if len(numbers) <= FEW_TOKENS:
            return set()
        # Not those that torch would have to expand.
        tokens = Counter(numbers)
        return {n for n, expert in used.items() if tokens[n] > FEW_TOKENS and self._plain(expert.spec)}

    def _plain(self, spec: ExpertSpec) -> bool:
        return spec.format in self._by_torch and spec.back_format in self._by_torch


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
    """Raises GeometryError if a layer's inputs do not fit together.

    Few steps, none of them numpy's arithmetic: each call's weights push this code out of the caches.
    """
    shape = hidden.shape
    if len(shape) != 2 or shape[1] != spec.hidden_size:
        raise GeometryError(f"Hidden states must be [tokens, {spec.hidden_size}], not {list(shape)}.")
    if hidden.dtype not in (torch.float32, torch.bfloat16) or not hidden.is_cpu:
        raise GeometryError(f"Hidden states must be f32 or bf16 on the CPU, not {hidden.dtype} on {hidden.device}.")
    if (offsets.dtype, pair_experts.dtype, pair_weights.dtype) != _DTYPES:
        raise GeometryError("Offsets and expert numbers must be of type uint32, weights of type float32.")
    if pair_experts.ndim != 1 or pair_experts.shape != pair_weights.shape:
        raise GeometryError(
            f"Every pair needs one expert and one weight; here are {pair_experts.shape} and {pair_weights.shape}."
        )
    starts = offsets.tolist()
    if offsets.ndim != 1 or len(starts) != shape[0] + 1 or starts[0] != 0 or starts[-1] != len(pair_experts):
        raise GeometryError(
            f"The offsets of {shape[0]} tokens must be {shape[0] + 1} numbers from 0 to {len(pair_experts)}."
        )
    if starts != sorted(starts):
        raise GeometryError("The offsets of tokens must not fall.")
    arrays = (offsets, pair_experts, pair_weights)
    if not all(array.flags.c_contiguous for array in arrays):
        raise GeometryError("Offsets, expert numbers and weights must be contiguous in memory.")
