"""Every implementation returns what the reference returns, for every kind of expert."""

import itertools
import logging
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.kernels import dense, ops, reference
from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import (
    PLAIN_BYTES,
    ROUNDED_FORMATS,
    Activation,
    ExpertSpec,
    Format,
    GeometryError,
    LayerGeometry,
)
from moehive.kernels.library import NativeLibraryError
from moehive.kernels.native import NativeExperts, kernels
from moehive.kernels.ops import FEW_TOKENS, ExpertOps, ExpertWeights, Reduction, load_expert

MakeExpert = Callable[[ExpertSpec, int], ExpertWeights]

# What a family may combine; the rest are sizes, formats and activations.
FLAGS: list[dict[str, object]] = [
    {"gated": False},
    {"gated": False, "bias": True},
    {},
    {"bias": True, "up_offset": 1.0},
    {"limit": 0.7},
    {"limit": 0.7, "limit_after_activation": True, "bias": True, "up_offset": -0.5},
    {"post_norm_eps": 1e-5},
    {"limit": 0.5, "bias": True, "up_offset": 1.0, "post_norm_eps": 1e-2, "gated": True},
]
KINDS = [
    {"activation": activation, "format": fmt, **flags}
    for activation, fmt, flags in itertools.product(get_args(Activation), PLAIN_BYTES, FLAGS)
]


def tolerance(spec: ExpertSpec, expected: torch.Tensor) -> float:
    """All implementations read the same stored weights and compute in f32, so whatever the format, they differ by
    the order of the sums: an error in each sum of about eps * sqrt(columns) of its size, then a square times another
    sum at most."""
    eps = torch.finfo(torch.float32).eps
    columns = spec.hidden_size + spec.intermediate_size
    return 16.0 * eps * math.sqrt(columns) * float(expected.abs().max().clamp(min=1.0))


def close(spec: ExpertSpec, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Of rows whose middles are rounded to bf16 a few may have a middle so near to halfway between two numbers that
    f32's sums decide: such a row is as far off as a step of 2^-7 makes it, fourfold after a norm or a square."""
    off, bound = (found - expected).abs().amax(1), tolerance(spec, expected)
    if spec.back_format not in ROUNDED_FORMATS:
        return bool((off <= bound).all())
    return bool((off <= 2**-5 * expected.abs().max()).all()) and int((off > bound).sum()) <= 1 + len(off) // 16


def native_forward(kernel: str, threads: int, expert: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(x), expert.spec.hidden_size), torch.nan)
    NativeExperts(kernel, threads).pairs(
        expert.spec,
        x,
        np.arange(len(x) + 1, dtype=np.uint32),
        np.full(len(x), expert.address, dtype=np.uint64),
        np.ones(len(x), dtype=np.float32),
        out,
    )
    return out


def check_all(spec: ExpertSpec, expert: ExpertWeights, x: torch.Tensor) -> None:
    expected = reference.expert_forward(spec, expert.tensors, x)
    for kernel in kernels():
        assert close(spec, native_forward(kernel, 1, expert, x), expected), kernel
    assert close(spec, dense.expert_forward(spec, expert.tensors, x), expected), "torch"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(value) for value in kind.values()))
def test_every_kind_of_expert(kind: dict[str, object], make_expert: MakeExpert) -> None:
    spec = ExpertSpec(hidden_size=65, intermediate_size=33, **kind)  # type: ignore[arg-type]
    check_all(spec, make_expert(spec, 0), torch.randn(5, 65, generator=torch.Generator().manual_seed(2)))


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    hidden=st.integers(2, 200),
    intermediate=st.integers(1, 150),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_every_shape(
    make_expert: MakeExpert, kind: dict[str, object], hidden: int, intermediate: int, tokens: int, seed: int
) -> None:
    # A norm of a row that is small by cancelling magnifies its rounding beyond any tolerance.
    if hidden < 16 or intermediate < 8:
        kind = {**kind, "post_norm_eps": None}
    spec = ExpertSpec(hidden_size=hidden, intermediate_size=intermediate, **kind)  # type: ignore[arg-type]
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))
    check_all(spec, make_expert(spec, seed), x)


@pytest.mark.parametrize("fmt", PLAIN_BYTES)
def test_a_projection_of_several_pieces(fmt: Format, make_expert: MakeExpert) -> None:
    """More rows than one piece of work has, and more tokens than one group."""
    spec = ExpertSpec(hidden_size=300, intermediate_size=1000, activation="silu", format=fmt)
    check_all(spec, make_expert(spec, 3), torch.randn(200, 300, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("activation", get_args(Activation))
def test_large_and_small_arguments(activation: Activation, make_expert: MakeExpert) -> None:
    """The activations hold far from zero, where exponentials over- and underflow."""
    spec = ExpertSpec(hidden_size=64, intermediate_size=64, activation=activation, format="f32", gated=False)
    expert = make_expert(spec, 5)
    expert.tensors["up"].copy_(torch.eye(64))
    expert.tensors["down"].copy_(torch.eye(64))
    powers = torch.logspace(-30, 4, 32)
    x = torch.cat([powers, -powers]).unsqueeze(0)
    expected = reference.expert_forward(spec, expert.tensors, x.double())
    for kernel in kernels():
        torch.testing.assert_close(native_forward(kernel, 1, expert, x), expected, rtol=2e-6, atol=1e-7)


def test_not_a_number_is_passed_on(make_expert: MakeExpert) -> None:
    """A broken hidden state must not come out as a plausible number."""
    for activation in get_args(Activation):
        spec = ExpertSpec(hidden_size=64, intermediate_size=32, activation=activation, limit=1.0)
        x = torch.zeros(1, 64)
        x[0, 3] = torch.nan
        for kernel in kernels():
            assert native_forward(kernel, 1, make_expert(spec, 6), x).isnan().all(), (kernel, activation)


# The layer: many experts and tokens at once, through the door.


class Layer:
    def __init__(self, make_expert: MakeExpert, tokens: int, experts: int, top_k: int, fmt: Format = "bf16") -> None:
        generator = torch.Generator().manual_seed(7)
        self.spec = ExpertSpec(hidden_size=72, intermediate_size=40, activation="silu", format=fmt)
        self.held = {10 * e: make_expert(self.spec, e) for e in range(experts)}
        self.hidden = torch.randn(tokens, 72, generator=generator)
        counts = torch.randint(0, top_k + 1, (tokens,), generator=generator).numpy()
        counts[-1] = top_k
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
        pairs = int(self.offsets[-1])
        self.experts = (10 * torch.randint(0, experts, (pairs,), generator=generator)).numpy().astype(np.uint32)
        self.weights = torch.rand(pairs, generator=generator).numpy()

    def run(self, door: ExpertOps, reduction: Reduction, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        hidden = self.hidden.to(dtype)
        return door.moe_layer(self.spec, self.held, hidden, self.offsets, self.experts, self.weights, reduction)

    def expected(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Pair by pair, from the reference."""
        sums = torch.zeros_like(self.hidden)
        for token in range(len(self.hidden)):
            for pair in range(self.offsets[token], self.offsets[token + 1]):
                expert = self.held[int(self.experts[pair])]
                x = self.hidden[token : token + 1].to(dtype)
                y = reference.expert_forward(self.spec, expert.tensors, x)
                sums[token] += y[0] * float(self.weights[pair])
        return sums


@pytest.mark.parametrize("tokens", [1, 3, 200])  # 200: some of the 8 experts have many tokens, some few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_a_layer(
    tokens: int, dtype: torch.dtype, native: bool, make_expert: MakeExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(make_expert, tokens, 8, 4)
    layer.experts[layer.experts >= 60] = np.where(np.arange(len(layer.experts[layer.experts >= 60])) < 9, 60, 0)
    if not native:
        monkeypatch.setattr(ops, "kernels", no_library)
    door = ExpertOps(1)
    assert door.kernel == (kernels()[0] if native else "torch")
    expected = layer.expected(dtype)
    found = layer.run(door, Reduction.PARTIAL_SUM, dtype)
    assert found.dtype == dtype and found.shape == expected.shape
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((found - expected).abs() <= rounding + tolerance(layer.spec, expected)).all()
    pairs = layer.run(door, Reduction.PER_EXPERT, dtype)
    assert pairs.dtype == dtype and pairs.shape == (len(layer.experts), 72)
    if dtype == torch.float32:
        sums = torch.zeros_like(found)
        for token in range(tokens):
            for pair in range(layer.offsets[token], layer.offsets[token + 1]):
                sums[token] += pairs[pair]
        assert torch.equal(sums, found), "the pairs added in the order listed are the partial sum, bit for bit"


def no_library() -> list[str]:
    raise NativeLibraryError("The native library is not there.")


def test_the_log_says_what_was_picked_and_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger="moehive.kernels.ops"):
        ExpertOps(1)
        monkeypatch.setattr(ops, "kernels", no_library)
        ExpertOps(1)
    picked, fallen_back = (record.getMessage() for record in caplog.records)
    assert f"native kernel {kernels()[0]} with 1 threads" in picked and ", ".join(kernels()) in picked
    assert "Torch computes all experts" in fallen_back and "The native library is not there." in fallen_back


def test_no_token_and_no_pair(make_expert: MakeExpert) -> None:
    layer = Layer(make_expert, 4, 2, 2)
    door = ExpertOps(1)
    layer.hidden, layer.offsets = layer.hidden[:0], np.zeros(1, np.uint32)
    layer.experts, layer.weights = layer.experts[:0], layer.weights[:0]
    assert layer.run(door, Reduction.PARTIAL_SUM).shape == (0, 72)
    assert layer.run(door, Reduction.PER_EXPERT).shape == (0, 72)
    layer.hidden, layer.offsets = torch.ones(2, 72), np.zeros(3, np.uint32)
    assert torch.equal(layer.run(door, Reduction.PARTIAL_SUM), torch.zeros(2, 72))


# The same bits, whatever else happens at the time.


@pytest.mark.parametrize("fmt", PLAIN_BYTES)
def test_threads_and_repetition_change_no_bit(fmt: Format, make_expert: MakeExpert) -> None:
    layer = Layer(make_expert, 24, 8, 4, fmt)
    first = layer.run(ExpertOps(1), Reduction.PARTIAL_SUM)
    for threads in (1, 2, 5):
        door = ExpertOps(threads)
        for _ in range(20):
            assert torch.equal(layer.run(door, Reduction.PARTIAL_SUM), first)


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("fmt", PLAIN_BYTES)
def test_company_changes_no_bit(kernel: str, fmt: Format, make_expert: MakeExpert) -> None:
    """A token's output is the same alone and among any number of others, at any place."""
    spec = ExpertSpec(hidden_size=130, intermediate_size=70, activation="gelu_tanh", format=fmt, post_norm_eps=1e-6)
    expert = make_expert(spec, 8)
    x = torch.randn(FEW_TOKENS, 130, generator=torch.Generator().manual_seed(9))
    alone = torch.cat([native_forward(kernel, 1, expert, x[i : i + 1]) for i in range(len(x))])
    for tokens in range(1, len(x) + 1):
        assert torch.equal(native_forward(kernel, 1, expert, x[-tokens:]), alone[-tokens:])


def test_other_experts_change_no_bit(make_expert: MakeExpert) -> None:
    """Nodes that hold half of the experts each return the same pairs as one that holds all."""
    layer = Layer(make_expert, 20, 8, 4)
    door = ExpertOps(2)
    whole = layer.run(door, Reduction.PER_EXPERT)
    for half in (layer.experts < 40, layer.experts >= 40):
        token_of = np.repeat(np.arange(20), np.diff(layer.offsets))[half]
        offsets = np.searchsorted(token_of, np.arange(21)).astype(np.uint32)
        part = door.moe_layer(
            layer.spec,
            layer.held,
            layer.hidden,
            offsets,
            np.ascontiguousarray(layer.experts[half]),
            np.ascontiguousarray(layer.weights[half]),
            Reduction.PER_EXPERT,
        )
        assert torch.equal(part, whole[torch.from_numpy(half)])


# Wrong arguments.


def test_an_expert_that_is_not_held_is_a_key_error(make_expert: MakeExpert) -> None:
    layer = Layer(make_expert, 3, 2, 2)
    layer.experts[1] = 99
    with pytest.raises(KeyError) as caught:
        layer.run(ExpertOps(1), Reduction.PARTIAL_SUM)
    assert caught.value.args == (99,)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("hidden", torch.zeros(3, 71), r"must be \[tokens, 72\], not \[3, 71\]"),
        ("hidden", torch.zeros(72), r"must be \[tokens, 72\], not \[72\]"),
        ("hidden", torch.zeros(3, 72).half().double(), "must be f32 or bf16"),
        ("offsets", np.array([0, 1, 2], np.uint32), "offsets of 3 tokens must be 4 numbers from 0 to 4"),
        ("offsets", np.array([0, 1, 2, 3], np.uint32), "offsets of 3 tokens must be 4 numbers from 0 to 4"),
        ("offsets", np.array([1, 1, 2, 4], np.uint32), "offsets of 3 tokens must be 4 numbers from 0 to 4"),
        ("offsets", np.array([0, 3, 2, 4], np.uint32), "must not fall"),
        ("offsets", np.array([0, 1, 2, 4], np.int64), "must be of type uint32"),
        ("experts", np.zeros(5, np.uint32), "needs one expert and one weight"),
        ("experts", np.zeros(8, np.uint32)[::2], "must be contiguous"),
        ("weights", np.zeros(4, np.float64), "weights of type float32"),
        ("spec", ExpertSpec(hidden_size=72, intermediate_size=40, activation="relu"), "another description"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    name: str, value: object, sentence: str, make_expert: MakeExpert
) -> None:
    layer = Layer(make_expert, 3, 2, 2)
    layer.offsets, layer.experts = np.array([0, 1, 2, 4], np.uint32), np.array([0, 10, 0, 10], np.uint32)
    layer.weights = np.ones(4, np.float32)
    setattr(layer, name, value)
    arguments = (layer.spec, layer.held, layer.hidden, layer.offsets, layer.experts, layer.weights)
    with pytest.raises(GeometryError, match=sentence):
        ExpertOps(1).moe_layer(*arguments, Reduction.PARTIAL_SUM)


def test_an_unknown_kernel_or_no_thread_is_refused() -> None:
    with pytest.raises(NativeLibraryError, match="can't start its kernel 'mmx' with 1 threads"):
        NativeExperts("mmx", 1)
    with pytest.raises(NativeLibraryError, match="with 0 threads"):
        NativeExperts(kernels()[0], 0)


def test_experts_of_one_layer_may_differ_in_their_formats() -> None:
    generator = torch.Generator().manual_seed(4)
    spec = ExpertSpec(hidden_size=64, intermediate_size=96, activation="silu", format="bf16")
    layer = LayerGeometry(3, 3, spec, (("q4_k", "q6_k"), ("bf16", "bf16"), ("q8_0", "q8_0")))
    held = {}
    for number in range(3):
        own = layer.spec_of(number)
        tensors = {place.name: torch.randn(place.shape, generator=generator) * 0.1 for place in spec.tensors}
        held[number] = load_expert(own, build_blob(own, tensors))
    assert layer.nbytes == sum(len(expert.blob) for expert in held.values())
    hidden = torch.randn(5, 64, generator=generator)
    offsets = np.arange(0, 18, 3, dtype=np.uint32)
    pair_experts = np.tile(np.array([2, 0, 1], dtype=np.uint32), 5)
    weights = np.full(15, 0.5, dtype=np.float32)
    ops = ExpertOps(1)
    both = ops.moe_layer(spec, held, hidden, offsets, pair_experts, weights, Reduction.PER_EXPERT)
    for number, expert in held.items():
        alone = ops.moe_layer(
            expert.spec, {number: expert}, hidden, np.arange(6, dtype=np.uint32),
            np.full(5, number, dtype=np.uint32), np.full(5, 0.5, dtype=np.float32), Reduction.PER_EXPERT,
        )  # fmt: skip
        assert torch.equal(both[[2, 0, 1].index(number) :: 3], alone)
