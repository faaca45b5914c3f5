"""Native latent attention against transformers' DeepSeek-V3 attention, whose projections are taken out."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from moehive.kernels.library import NativeLibraryError
from moehive.kernels.mla import Mla, MlaLayer
from moehive.kernels.trunk_ops import PAGE, TrunkOps, sequences

# heads, nope, rope, rank, value
SHAPES = [(4, 8, 8, 16, 8), (7, 128, 64, 512, 128), (3, 10, 4, 20, 6), (1, 32, 16, 72, 40)]


@pytest.fixture(scope="module")
def ops() -> TrunkOps:
    return TrunkOps(2)


class Given(torch.nn.Module):
    """A projection whose result is known."""

    def __init__(self, result: torch.Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.result


def attention_of(shape: tuple[int, ...], interleaved: bool) -> DeepseekV3Attention:
    """transformers' layer whose queries, latents and output pass through untouched."""
    heads, nope, rope, rank, value = shape
    config = DeepseekV3Config(
        num_attention_heads=heads,
        num_key_value_heads=heads,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        kv_lora_rank=rank,
        v_head_dim=value,
        q_lora_rank=None,
        hidden_size=8,
        rope_interleave=interleaved,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(2)
    attention = DeepseekV3Attention(config, 0).eval()
    attention.kv_a_layernorm.weight.data = torch.rand(rank) + 0.5
    attention.kv_b_proj.weight.data = torch.randn_like(attention.kv_b_proj.weight) * rank**-0.5
    attention.o_proj = torch.nn.Identity()  # type: ignore[assignment]
    return attention


def layer_of(attention: DeepseekV3Attention) -> MlaLayer:
    return MlaLayer(
        heads=attention.num_heads,
        nope=attention.qk_nope_head_dim,
        rope=attention.qk_rope_head_dim,
        rank=attention.kv_lora_rank,
        value=int(attention.v_head_dim or 0),
        scale=attention.scaling,
        up=attention.kv_b_proj.weight.data,
        norm=attention.kv_a_layernorm.weight.data,
        norm_eps=attention.kv_a_layernorm.variance_epsilon,
        page_at=64,
        dtype=torch.float32,
        interleaved=bool(attention.config.rope_interleave),
    )


def angles(rope: int, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(start, start + tokens)
    angle = positions[:, None].float() * 100.0 ** -(torch.arange(0, rope, 2).float() / rope)
    return angle.cos(), angle.sin()


@torch.no_grad()
def expected(attention: DeepseekV3Attention, queries: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """All tokens of one sequence at once: [T, heads * value]."""
    tokens = len(queries)
    attention.q_proj = Given(queries[None])  # type: ignore[assignment]
    attention.kv_a_proj_with_mqa = Given(compressed[None])  # type: ignore[assignment]
    cos, sin = (torch.cat((part, part), dim=-1)[None] for part in angles(attention.qk_rope_head_dim, 0, tokens))
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
    out, _ = attention(torch.zeros(1, tokens, 8), (cos, sin), mask)
    return out[0]  # type: ignore[no-any-return]


class Sequence:
    """One sequence's inputs and its pages."""

    def __init__(self, layer: MlaLayer, tokens: int) -> None:
        self.layer = layer
        self.queries = torch.randn(tokens, layer.heads * (layer.nope + layer.rope)) * 2
        self.compressed = torch.randn(tokens, layer.rank + layer.rope)
        count = -(-tokens // PAGE)
        self.pages = [torch.full((layer.page_at + layer.page_bytes,), 255, dtype=torch.uint8) for _ in range(count)]
        self.addresses = torch.tensor([page.data_ptr() for page in self.pages])
        self.done = 0


def run(mla: Mla, parts: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
    """One native call for the next tokens of several sequences."""
    layer = mla.layer
    rows, cos, sin, queries, compressed, first = [], [], [], [], [], 0
    for sequence, tokens in parts:
        end = sequence.done + tokens
        rows.append((first, tokens, sequence.done, sequence.addresses.data_ptr()))
        queries.append(sequence.queries[sequence.done : end])
        compressed.append(sequence.compressed[sequence.done : end])
        angle = angles(layer.rope, sequence.done, tokens)
        cos.append(angle[0])
        sin.append(angle[1])
        first += tokens
        sequence.done = end
    out = torch.full((first, layer.heads * layer.value), torch.nan)
    wide = torch.nn.functional.pad(torch.cat(compressed), (0, 3))[:, :-3]  # rows further apart than they are long
    absorbed = torch.empty(first, layer.heads * (layer.rank + layer.rope))
    mla(torch.cat(queries), wide, sequences(rows), torch.cat(cos), torch.cat(sin), absorbed, out)
    return list(out.split([tokens for _, tokens in parts]))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_transformers_layer(ops: TrunkOps, shape: tuple[int, ...], interleaved: bool) -> None:
    attention = attention_of(shape, interleaved)
    layer = layer_of(attention)
    mla = Mla(ops, layer)
    whole, parts = Sequence(layer, 75), Sequence(layer, 75)
    parts.queries, parts.compressed = whole.queries, whole.compressed
    theirs = expected(attention, whole.queries, whole.compressed)
    (ours,) = run(mla, [(whole, 75)])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    pieces = [run(mla, [(parts, tokens)])[0] for tokens in (1, 30, 2, 31, 1, 10)]
    assert torch.equal(torch.cat(pieces), ours)  # how a prompt is cut does not change a bit


def test_a_batch_is_its_sequences(ops: TrunkOps) -> None:
    attention = attention_of(SHAPES[0], True)
    layer = layer_of(attention)
    mla = Mla(ops, layer)
    batch = [Sequence(layer, tokens) for tokens in (70, 3, 40)]
    theirs = [expected(attention, sequence.queries, sequence.compressed) for sequence in batch]
    ours: list[list[torch.Tensor]] = [[], [], []]
    for step in itertools.count():
        going = [(i, s, min(1 + 7 * i + step, len(s.queries) - s.done)) for i, s in enumerate(batch)]
        going = [(i, s, tokens) for i, s, tokens in going if tokens]
        if not going:
            break
        for (i, _, _), out in zip(going, run(mla, [(s, tokens) for _, s, tokens in going]), strict=True):
            ours[i].append(out)
    for sequence, mine, his in zip(batch, ours, theirs, strict=True):
        torch.testing.assert_close(torch.cat(mine), his, rtol=1e-4, atol=2e-5)
        sequence.done = 0
        assert torch.equal(
            torch.cat(mine), run(mla, [(sequence, len(sequence.queries))])[0]
        )  # company changes no bit


def test_bf16_weights_and_cache(ops: TrunkOps) -> None:
    attention = attention_of(SHAPES[1], True)
    layer = layer_of(attention)
    half = layer.up.bfloat16()
    attention.kv_b_proj.weight.data = half.float()
    sequence, stored = Sequence(layer, 40), Sequence(layer, 40)
    theirs = expected(attention, sequence.queries, sequence.compressed)
    (ours,) = run(Mla(ops, replace(layer, up=half)), [(sequence, 40)])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)  # the weights are the same numbers
    stored.queries, stored.compressed = sequence.queries, sequence.compressed
    (rounded,) = run(Mla(ops, replace(layer, up=half, dtype=torch.bfloat16)), [(stored, 40)])
    assert 0 < (rounded - theirs).norm() < 2**-6 * theirs.norm()  # 8 bits of latents; scores of a few units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 10, 4, 20, 6), (70, 8, 4, 34, 6)])
def test_many_pages_give_the_same_bits_whoever_attends(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    attention = attention_of(shape, True)
    layer = replace(layer_of(attention), dtype=dtype)
    tokens = 540  # two spans, the first of 512
    given = Sequence(layer, tokens)
    results = []
    for threads, last in ((1, tokens), (3, tokens), (1, 1), (2, 1), (9, 1), (2, 40)):
        sequence, mla = Sequence(layer, tokens), Mla(TrunkOps(threads), layer)
        sequence.queries, sequence.compressed = given.queries, given.compressed
        parts = [run(mla, [(sequence, count)])[0] for count in (tokens - last, last) if count]
        results.append(torch.cat(parts))
    tolerance = (1e-4, 2e-5) if dtype == torch.float32 else (2**-4, 2**-5)
    theirs = expected(attention, given.queries, given.compressed)
    torch.testing.assert_close(results[0], theirs, rtol=tolerance[0], atol=tolerance[1])
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_what_there_is_no_room_for_is_refused(ops: TrunkOps) -> None:
    layer = layer_of(attention_of(SHAPES[0], True))
    with pytest.raises(NativeLibraryError, match="not supported"):
        Mla(ops, replace(layer, rank=1025))
