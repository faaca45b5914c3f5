"""A layer in two calls has the bits of its operations one by one; matrices that do not fit are refused."""

import ctypes
from time import perf_counter_ns

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.kernels.blob import empty_blob
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import Format, tensor_bytes
from moehive.kernels.layer import DecoderLayer, GatedMlp, Mixer, Router, Step
from moehive.kernels.library import NativeLibraryError
from moehive.kernels.linear import FEW_TOKENS, LinearOps, LinearWeights
from moehive.kernels.trunk_ops import AttentionLayer, RouterLayer, TrunkOps, sequences

WIDTH, HEADS, HEAD, EXPERTS, TOP_K = 256, 4, 64, 64, 6
linear, trunk = LinearOps(2), TrunkOps(2)
formats = st.sampled_from(["f32", "bf16", "q8_0", "q4_0", "q4_k"])
SOFTMAX = AttentionLayer(
    heads=HEADS, kv_heads=1, head_dim=HEAD, rotary=HEAD, scale=HEAD**-0.5, page_at=0, dtype=torch.float32
)


def matrix(format: Format, rows: int, columns: int, seed: int, bias: bool = False) -> LinearWeights:
    generator = torch.Generator().manual_seed(seed)
    blob = empty_blob(tensor_bytes(format, rows, columns))
    FORMATS[format].encode(torch.randn(rows, columns, generator=generator) / columns**0.5, blob)
    return LinearWeights(format, rows, columns, blob, torch.randn(rows, generator=generator) if bias else None)


def mlp_of(format: Format, bias: bool = False, shared: bool = False) -> GatedMlp:
    gate, up = (matrix(format, 512, WIDTH, seed, bias) for seed in (1, 2))
    share = matrix("f32", 1, WIDTH, 4) if shared else None
    return GatedMlp(gate=gate, up=up, down=matrix(format, WIDTH, 512, 3, bias), activation="silu", share=share)


def mixer_of(format: Format) -> Mixer:
    rows = (HEADS * HEAD, HEAD, HEAD)
    return Mixer(
        kind="softmax",
        structure=SOFTMAX.structure(),
        owner=SOFTMAX,
        projections=[matrix(format, count, WIDTH, 6 + n) for n, count in enumerate(rows)],
        output=matrix(format, WIDTH, HEADS * HEAD, 9),
    )


def layer_of(
    mixer: Mixer, router: Router | None, mlp: GatedMlp | None, before: DecoderLayer | None = None
) -> DecoderLayer:
    norm = torch.linspace(0.5, 1.5, WIDTH)
    return DecoderLayer(
        trunk, norm=norm, mixer=mixer, mlp_norm=norm.flip(0), eps=1e-6, router=router, mlp=mlp, before=before
    )


class OneSequence:
    """A pass of one sequence from its start, and the same operations one by one."""

    def __init__(self, tokens: int, router: RouterLayer | None) -> None:
        self.page = torch.empty(SOFTMAX.page_bytes, dtype=torch.uint8)
        self.addresses = (ctypes.c_uint64 * 1)(self.page.data_ptr())
        self.batch = sequences([(0, tokens, 0, ctypes.addressof(self.addresses))])
        inverse = 1e4 ** -(torch.arange(0, HEAD, 2) / HEAD)
        self.cos, self.sin = trunk.rope(self.batch, inverse, 1.0)
        self.step = Step(WIDTH, router, half=False)
        self.step.begin(tokens, self.batch, [self.batch], (ctypes.c_void_p * 1)(), self.cos, self.sin)
        self.hidden = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
        self.step.hidden.copy_(self.hidden)
        self.norm = torch.linspace(0.5, 1.5, WIDTH)

    def mixed(self, mixer: Mixer) -> torch.Tensor:
        """Adds to `hidden` and gives the MLP's input."""
        x = torch.empty_like(self.hidden)
        trunk.add_norm(self.hidden, norm=self.norm, eps=1e-6, out=x)
        rows, out = linear.linears(mixer.projections, x), torch.empty(len(x), HEADS * HEAD)
        trunk.attend(SOFTMAX.structure(), rows, self.batch, self.cos, self.sin, out)
        added = linear.linear(mixer.output, out)
        trunk.add_norm(self.hidden, added, norm=self.norm.flip(0), eps=1e-6, out=x)
        return x


@settings(max_examples=30, deadline=None)
@given(
    formats,
    st.integers(1, FEW_TOKENS),
    st.sampled_from(["none", "asked for", "left to the next call"]),
    st.sampled_from(["softmax", "sigmoid", "chosen_softmax"]),
)
def test_two_layers_and_the_head(format: Format, tokens: int, shared: str, scores: str) -> None:
    """A routed layer with or without a shared expert, whoever computes it, and one that is dense."""
    how = RouterLayer(experts=EXPERTS, top_k=TOP_K, scores=scores, renormalize=True)  # type: ignore[arg-type]
    router, mixer = Router(matrix(format, EXPERTS, WIDTH, 5), how), mixer_of(format)
    mlp = None if shared == "none" else mlp_of(format, shared=True)
    first = layer_of(mixer, router, mlp)
    second = layer_of(mixer, None, mlp_of(format, bias=True), first)
    one = OneSequence(tokens, how)
    step, experts = one.step, torch.randn(tokens, WIDTH).to(torch.bfloat16)

    first.mix(step, None)
    x = one.mixed(mixer)
    logits = linear.linear(router.weights, x)
    ids, weights = torch.empty(tokens, TOP_K, dtype=torch.int64), torch.empty(tokens, TOP_K)
    trunk.route(how.structure(), logits, ids, weights)
    assert torch.equal(step.sent, x) and torch.equal(step.logits, logits)
    assert torch.equal(step.ids, ids) and torch.equal(step.weights, weights)
    if mlp is None:
        trunk.add_norm(one.hidden, experts)
    else:
        assert mlp.share is not None
        if shared == "asked for":
            first.mlp(step)
        trunk.add_norm(one.hidden, experts, dense(mlp, x), linear.linear(mlp.share, x)[:, 0])

    second.mix(step, experts)
    x = one.mixed(mixer)
    assert torch.equal(step.sent, x)
    second.mlp(step)
    trunk.add_norm(one.hidden, dense(mlp_of(format, bias=True), x))
    wanted = torch.tensor(sorted({0, tokens // 2, tokens - 1}))
    head, last = matrix(format, 96, WIDTH, 11), one.hidden[wanted]
    trunk.add_norm(last, norm=one.norm, eps=1e-6, out=last)
    assert torch.equal(second.logits(step, None, one.norm, head, wanted), linear.linear(head, last))
    assert torch.equal(step.hidden, one.hidden)


def test_a_shared_expert_is_computed_while_its_caller_does_something_else() -> None:
    how = RouterLayer(experts=EXPERTS, top_k=TOP_K, scores="softmax", renormalize=True)
    mlp, busy = mlp_of("f32", shared=True), matrix("f32", 1024, 1024, 1)
    layer = layer_of(mixer_of("f32"), Router(matrix("f32", EXPERTS, WIDTH, 5), how), mlp)
    one, x = OneSequence(1, how), torch.ones(1, 1024)
    times = None
    while times is None:  # others may have the processors, so that no thread is awake or gets to it
        for _ in range(20):
            linear.linear(busy, x)  # wakes the pool's thread
        one.step.begin(1, one.batch, [one.batch], (ctypes.c_void_p * 1)(), one.cos, one.sin)
        start = perf_counter_ns()
        layer.mix(one.step, None)
        sum(range(20_000))
        times = one.step.beside()
        if times is None:
            one.step.drop()
    assert start < times[0] < times[1] < perf_counter_ns()
    layer.mlp(one.step)  # finds it done
    assert one.step.beside() == times


def test_a_pass_that_ends_early_leaves_nobody_in_its_memory() -> None:
    how = RouterLayer(experts=EXPERTS, top_k=TOP_K, scores="softmax", renormalize=True)
    mixer, mlp = mixer_of("q4_0"), mlp_of("q4_0")
    layer = layer_of(mixer, Router(matrix("q4_0", EXPERTS, WIDTH, 5), how), mlp)
    for tokens in (1, FEW_TOKENS, 2, 1):
        one = OneSequence(tokens, how)
        added = one.step._kept[1][:tokens]  # type: ignore[index]
        layer.mix(one.step, None)
        one.step.drop()
        assert torch.equal(added, dense(mlp, one.mixed(mixer)))  # whoever computed it has come to its end
        added.zero_()
        one.step.drop()
        layer.mlp(one.step)
        assert not added.any()  # there was nothing left to do


def dense(mlp: GatedMlp, x: torch.Tensor) -> torch.Tensor:
    middle = torch.empty(len(x), mlp.down.columns)
    trunk.gate(linear.linears([mlp.gate, mlp.up], x), mlp.activation, middle)
    return linear.linear(mlp.down, middle)


def test_matrices_that_do_not_fit_are_refused() -> None:
    how = RouterLayer(experts=EXPERTS + 1, top_k=TOP_K, scores="softmax", renormalize=True)
    one = OneSequence(1, how)
    step = one.step
    with pytest.raises(NativeLibraryError, match="refuses"):
        layer_of(mixer_of("f32"), Router(matrix("f32", EXPERTS, WIDTH, 5), how), None).mix(step, None)
    narrow = GatedMlp(
        gate=matrix("f32", 64, WIDTH, 1),
        up=matrix("f32", 32, WIDTH, 2),
        down=matrix("f32", WIDTH, 64, 3),
        activation="silu",
    )
    with pytest.raises(NativeLibraryError, match="refuses"):
        layer_of(mixer_of("f32"), None, narrow).mlp(step)
    short = Mixer(
        kind="softmax",
        structure=SOFTMAX.structure(),
        owner=SOFTMAX,
        projections=[matrix("f32", HEADS * HEAD, WIDTH, 1)],
        output=matrix("f32", WIDTH, HEADS * HEAD, 2),
    )
    with pytest.raises(NativeLibraryError, match="refuses"):
        layer_of(short, None, None).mix(step, None)
