"""Layers of so many pairs that intermediate results are computed in parts: `kBlock` of kernels/cpu/expert_mlp.cc."""

import numpy as np
import pytest
import torch

from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertSpec, Format
from moehive.kernels.native import NativeExperts, kernels
from moehive.kernels.ops import ExpertWeights, load_expert
from moehive.kernels.reference import expert_forward

TOKENS, EXPERTS = 300, 6
BLOCK = 1 << 19  # floats of intermediate results at once


def routing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, experts and weights: two experts for a token, the first of all, one of none, and one of three; the
    first expert has more tokens than a part of the middles has room for."""
    rng = np.random.default_rng(1)
    chosen = [[0, int(rng.integers(1, EXPERTS))] for _ in range(TOKENS)]
    chosen[7], chosen[80] = [], [5, 3, 0]
    experts = np.concatenate(chosen).astype(np.uint32)
    offsets = np.cumsum([0, *map(len, chosen)]).astype(np.uint32)
    return offsets, experts, rng.uniform(0.1, 1, len(experts)).astype(np.float32)


def experts_of(spec: ExpertSpec) -> list[ExpertWeights]:
    generator = torch.Generator().manual_seed(2)
    tensors = {p.name: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 for p in spec.tensors}
    return [
        load_expert(spec, build_blob(spec, {name: one.roll(i, 0) for name, one in tensors.items()}))
        for i in range(EXPERTS)
    ]


@pytest.mark.parametrize(
    ("hidden", "middle", "fmt"),
    [
        (4096, 64, "q8_0"), (4096, 64, "bf16"),  # results of some columns at a time
        (64, 4096, "q8_0"), (64, 4096, "fp8_block"), (64, 4096, "bf16"),  # middles of some experts at a time
    ],
)  # fmt: skip
def test_parts_make_the_same_whole(hidden: int, middle: int, fmt: Format) -> None:
    spec = ExpertSpec(hidden_size=hidden, intermediate_size=middle, activation="silu", format=fmt, bias=True)
    held = experts_of(spec)
    offsets, experts, weights = routing()
    assert len(experts) * max(hidden, middle) > 2 * BLOCK and int((experts == 0).sum()) * 4096 > BLOCK
    native = NativeExperts(kernels()[0], 2)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(TOKENS, hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
        addresses = [held[number].address for number in experts]
        pairs, sums = (native.layer(spec, x, offsets, addresses, weights, added) for added in (False, True))
        alone = torch.empty(len(experts), hidden)
        for t in range(TOKENS):
            here = slice(offsets[t], offsets[t + 1])
            count = np.array([0, offsets[t + 1] - offsets[t]], dtype=np.uint32)
            alone[here] = native.layer(spec, x[t : t + 1].float(), count, addresses[here], weights[here], False)
        wanted = torch.zeros(TOKENS, hidden)
        for t in range(TOKENS):
            for pair in range(offsets[t], offsets[t + 1]):
                wanted[t] += alone[pair]
        assert torch.equal(pairs, alone.to(dtype)) and torch.equal(sums, wanted.to(dtype))
        there = native.layer(spec, x.clone(), offsets, addresses, weights, True, in_place=True)
        assert torch.equal(there, sums), "what is written lies where the states were read"
        owners = np.repeat(np.arange(TOKENS), np.diff(offsets))
        for number, expert in enumerate(held):
            places = np.flatnonzero(experts == number)
            true = (
                expert_forward(spec, expert.tensors, x[owners[places]]) * torch.from_numpy(weights[places])[:, None]
            )
            off = (alone[places] - true).norm(dim=1) / true.norm(dim=1)
            # Vectors in 8 bits; or in bf16, where a middle between two numbers may be the other one: 2^-7 of it.
            assert off.max() < (0.02 if fmt == "q8_0" else 2e-3)
            assert fmt == "q8_0" or off.median() < 1e-4
