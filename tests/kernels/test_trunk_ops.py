"""The trunk's native operations against torch: norms, attention of every shape, router."""

import ctypes
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.kernels.trunk_ops import PAGE, AttentionLayer, RouterLayer, TrunkOps, sequences

OPS = TrunkOps(2)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """`x` [T, heads, n] with its first 2 * cos.shape[1] numbers turned."""
    half = cos.shape[1]
    turn, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (turn[..., 0::2], turn[..., 1::2]) if interleaved else (turn[..., :half], turn[..., half:])
    c, s = cos[:, None], sin[:, None]
    a, b = first * c - second * s, second * c + first * s
    return torch.cat([torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1), rest], -1)


def reference(layer: AttentionLayer, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """All tokens of one sequence at once, [T, heads * head_dim]."""
    tokens, n = len(rows), layer.head_dim
    queries, keys, values = rows.split([layer.row - 2 * layer.kv_heads * n, *[layer.kv_heads * n] * 2], 1)
    gate = None
    if layer.gated:
        queries, gate = queries.reshape(tokens, layer.heads, 2 * n).chunk(2, -1)
    q, k = queries.reshape(tokens, layer.heads, n), keys.reshape(tokens, layer.kv_heads, n)
    if layer.query_norm is not None and layer.key_norm is not None:
        q = F.rms_norm(q, (n,), layer.query_norm, layer.eps)
        k = F.rms_norm(k, (n,), layer.key_norm, layer.eps)
    q, k = turned(q, cos, sin, layer.interleaved), turned(k, cos, sin, layer.interleaved)
    group = layer.heads // layer.kv_heads
    k = k.to(layer.dtype).float().repeat_interleave(group, 1)
    v = values.reshape(tokens, layer.kv_heads, n).to(layer.dtype).float().repeat_interleave(group, 1)
    scores = torch.einsum("qhn,khn->hqk", q, k) * layer.scale
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    scores = scores.masked_fill((back < 0) | (back >= (layer.window or tokens)), -torch.inf)
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks[:, None, None].expand(-1, tokens, 1)], -1)
    out = torch.einsum("hqk,khn->qhn", scores.softmax(-1)[..., :tokens], v)
    return (out if gate is None else out * gate.sigmoid()).flatten(1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_attention(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3, 5, 17]))
    heads, n = kv_heads * group, 2 * data.draw(st.integers(1, 40))
    norms = data.draw(st.booleans())
    layer = AttentionLayer(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=n,
        rotary=2 * data.draw(st.integers(0, n // 2)),
        scale=n**-0.5,
        page_at=64 * data.draw(st.integers(0, 2)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        window=data.draw(st.sampled_from([None, 1, 7, 32, 33, 50])),
        gated=data.draw(st.booleans()),
        interleaved=data.draw(st.booleans()),
        query_norm=torch.randn(n) if norms else None,
        key_norm=torch.randn(n) if norms else None,
        sinks=torch.randn(heads) if data.draw(st.booleans()) else None,
    )
    tokens = data.draw(st.integers(1, 110))
    rows = torch.randn(tokens, layer.row)
    angles = torch.randn(tokens, layer.rotary // 2)
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()
    expected = reference(layer, rows, cos, sin)

    # What is not written yet must not matter: pages begin as NaN.
    nbytes = layer.page_at + layer.page_bytes
    pages = [torch.full((nbytes,), 0xFF, dtype=torch.uint8) for _ in range(-(-tokens // PAGE))]
    addresses = (ctypes.c_uint64 * len(pages))(*(page.data_ptr() for page in pages))
    native, out, start = layer.structure(), torch.empty(tokens, heads * n), 0
    while start < tokens:
        count = min(tokens - start, data.draw(st.integers(1, 60)))
        here = slice(start, start + count)
        batch = sequences([(0, count, start, ctypes.addressof(addresses))])
        OPS.attend(native, rows[here], batch, cos[here], sin[here], out[here])
        start += count
    tolerance = 1e-4 if layer.dtype == torch.float32 else 2e-2  # turned keys may round to the bf16 beside
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "group", "window"), [(2, 8, None), (1, 5, 700), (3, 1, 513)])
def test_attention_over_many_pages_has_the_same_bits_however_it_is_shared_out(
    kv_heads: int, group: int, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(kv_heads)
    heads, n, tokens = kv_heads * group, 48, 1300  # three spans of 512 tokens
    layer = AttentionLayer(
        heads=heads, kv_heads=kv_heads, head_dim=n, rotary=n, scale=n**-0.5, page_at=0, dtype=dtype, window=window,
        gated=True, sinks=torch.randn(heads),
    )  # fmt: skip
    rows, angles = torch.randn(tokens, layer.row), torch.randn(tokens, n // 2)
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()
    expected = reference(layer, rows, cos, sin)
    results = []
    for threads, last in ((1, tokens), (3, tokens), (1, 1), (2, 1), (5, 1), (2, 3), (3, 40)):
        ops = TrunkOps(threads)
        pages = [torch.full((layer.page_bytes,), 0xFF, dtype=torch.uint8) for _ in range(-(-tokens // PAGE))]
        addresses = (ctypes.c_uint64 * len(pages))(*(page.data_ptr() for page in pages))
        out, own = torch.empty(tokens, heads * n), rows.clone()
        # All at once, or the last ones of them after the others.
        for start, count in ((0, tokens - last), (tokens - last, last)):
            if count:
                here = slice(start, start + count)
                batch = sequences([(0, count, start, ctypes.addressof(addresses))])
                ops.attend(layer.structure(), own[here], batch, cos[here], sin[here], out[here])
        results.append(out)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results[0], expected, rtol=tolerance, atol=tolerance)
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.parametrize("half", [False, True])
def test_add_norm(half: bool) -> None:
    torch.manual_seed(1)
    hidden, more, gates = torch.randn(5, 77), torch.randn(5, 77), torch.randn(5, 3)
    add = torch.randn(5, 77).to(torch.bfloat16 if half else torch.float32)
    norm, out, half_out = torch.randn(77), torch.empty(5, 77), torch.empty(5, 77, dtype=torch.bfloat16)
    expected = hidden + add.float() + more * gates[:, 2:].sigmoid()
    OPS.add_norm(hidden, add, more, gates[:, 2], norm, 1e-6, out, half_out)
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(out, F.rms_norm(expected, (77,), norm, 1e-6))
    assert torch.equal(half_out, out.to(torch.bfloat16))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gate(activation: str) -> None:
    torch.manual_seed(2)
    rows = torch.cat([torch.randn(3, 75) * 30, torch.randn(3, 75), torch.randn(3, 4)], 1)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
    }
    out = torch.empty(3, 75)
    OPS.gate(rows, activation, out)  # type: ignore[arg-type]
    torch.testing.assert_close(out, functions[activation](rows[:, :75]) * rows[:, 75:150], rtol=1e-5, atol=1e-5)


def test_router_of_groups_weighs_by_scores_without_the_bias() -> None:
    torch.manual_seed(3)
    bias = torch.randn(32)
    router = RouterLayer(
        experts=32, top_k=4, scores="sigmoid", renormalize=True, bias=bias, groups=4, top_groups=2, scaling=2.5
    )
    logits = torch.randn(20, 32)
    ids, weights = torch.empty(20, 4, dtype=torch.int64), torch.empty(20, 4)
    OPS.route(router.structure(), logits, ids, weights)
    scores = logits.sigmoid()
    choice = (scores + bias).view(20, 4, 8)
    kept = choice.topk(2, -1).values.sum(-1).topk(2, -1).indices
    mask = torch.zeros(20, 4, dtype=torch.bool).scatter(1, kept, True)[..., None]
    expected = choice.masked_fill(~mask, -torch.inf).flatten(1).topk(4, -1).indices
    assert torch.equal(ids, expected)
    chosen = scores.gather(1, expected)
    torch.testing.assert_close(weights, 2.5 * chosen / chosen.sum(-1, keepdim=True))
