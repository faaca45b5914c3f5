"""The native Gated DeltaNet against transformers' own functions."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNormGated,
    causal_conv1d_fn,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from moehive.kernels.delta_net import DeltaNet, DeltaNetLayer, DeltaNetState
from moehive.kernels.library import NativeLibraryError
from moehive.kernels.trunk_ops import TrunkOps, sequences

EPS = 1e-6
# key heads, value heads, numbers of a key, of a value, taps
SHAPES = [(2, 4, 8, 8, 4), (16, 32, 128, 128, 4), (1, 3, 20, 40, 2), (2, 2, 7, 5, 3), (4, 4, 64, 96, 4)]


@pytest.fixture(scope="module")
def ops() -> TrunkOps:
    return TrunkOps(2)


def layer_of(shape: tuple[int, ...], grouped: bool) -> DeltaNetLayer:
    key_heads, value_heads, key_dim, value_dim, taps = shape
    torch.manual_seed(1)
    return DeltaNetLayer(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        grouped=grouped,
        conv=torch.randn(taps, 2 * key_heads * key_dim + value_heads * value_dim) * 0.5,
        decay=-torch.empty(value_heads).uniform_(0.01, 4),
        dt_bias=torch.randn(value_heads),
        norm=torch.randn(value_dim),
        norm_eps=EPS,
    )


def new_state(layer: DeltaNetLayer) -> DeltaNetState:
    return DeltaNetState(torch.zeros(layer.conv_shape), torch.zeros(layer.recurrent_shape))


def split(layer: DeltaNetLayer, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A projected row [T, row] into the convolution's input, z, b and a, as transformers does."""
    heads, share = layer.value_heads, layer.value_heads // layer.key_heads
    values = heads * layer.value_dim
    if not layer.grouped:
        x, z, b, a = rows.split([layer.channels, values, heads, heads], dim=-1)
        return x, z, b, a
    qkvz, ba = rows.split([layer.channels + values, 2 * heads], dim=-1)
    parts = qkvz.reshape(len(rows), layer.key_heads, -1).split(
        [layer.key_dim, layer.key_dim, share * layer.value_dim, share * layer.value_dim], dim=2
    )
    q, k, v, z = (part.reshape(len(rows), -1) for part in parts)
    b, a = (part.reshape(len(rows), -1) for part in ba.reshape(len(rows), layer.key_heads, -1).split(share, dim=2))
    return torch.cat((q, k, v), dim=-1), z, b, a


def expected(layer: DeltaNetLayer, rows: torch.Tensor, rule: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence from its beginning: outputs [T, value_heads * value_dim] and the last state, by transformers."""
    x, z, b, a = split(layer, rows)
    mixed = causal_conv1d_fn(x.T[None], layer.conv.T.contiguous(), None, activation="silu")[0].T
    keys = layer.key_heads * layer.key_dim
    q, k, v = mixed.split([keys, keys, layer.value_heads * layer.value_dim], dim=-1)
    tokens = len(rows)
    g = layer.decay * torch.nn.functional.softplus(a + layer.dt_bias)
    out, state = rule(
        q.reshape(1, tokens, layer.key_heads, -1),
        k.reshape(1, tokens, layer.key_heads, -1),
        v.reshape(1, tokens, layer.value_heads, -1),
        g=g[None],
        beta=b.sigmoid()[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    norm = Qwen3NextRMSNormGated(layer.value_dim, eps=EPS)
    norm.weight.data = layer.norm
    with torch.no_grad():
        out = norm(out.reshape(-1, layer.value_dim), z.reshape(-1, layer.value_dim))
    return out.reshape(tokens, -1), state[0]


def run(net: DeltaNet, parts: list[torch.Tensor], states: list[DeltaNetState]) -> list[torch.Tensor]:
    """One native call for the next tokens of several sequences."""
    rows = torch.cat(parts)
    places, first = [], 0
    for part in parts:
        places.append((first, len(part), 0, 0))
        first += len(part)
    out = torch.full((len(rows), net.layer.value_heads * net.layer.value_dim), torch.nan)
    net(rows, sequences(places), states, torch.empty(len(rows), net.layer.channels), out)
    return list(out.split([len(part) for part in parts]))


def matrix(layer: DeltaNetLayer, state: DeltaNetState) -> torch.Tensor:
    """The recurrent state as transformers has it: [value_heads, key_dim, value_dim]."""
    return state.recurrent.permute(0, 2, 1, 3).reshape(layer.value_heads, layer.key_dim, -1)[..., : layer.value_dim]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_transformers_layer(ops: TrunkOps, shape: tuple[int, ...], grouped: bool) -> None:
    layer = layer_of(shape, grouped)
    net = DeltaNet(ops, layer)
    rows = torch.randn(70, layer.row)
    state = new_state(layer)
    (out,) = run(net, [rows], [state])
    for rule in (torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule):
        theirs, last = expected(layer, rows, rule)
        torch.testing.assert_close(out, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))
        torch.testing.assert_close(matrix(layer, state), last, rtol=1e-4, atol=2e-5 * float(last.abs().max()))


@pytest.mark.parametrize("grouped", [False, True])
def test_batches_and_chunks_do_not_change_a_bit(ops: TrunkOps, grouped: bool) -> None:
    layer = layer_of(SHAPES[4], grouped)
    net = DeltaNet(ops, layer)
    prompts = [torch.randn(tokens, layer.row) for tokens in (37, 5, 1, 20)]
    whole = [run(net, [prompt], [new_state(layer)])[0] for prompt in prompts]
    states = [new_state(layer) for _ in prompts]
    outs: list[list[torch.Tensor]] = [[] for _ in prompts]
    at = [0] * len(prompts)
    for chunk in (1, 3, 16, 1, 1, 40):
        going = [i for i, prompt in enumerate(prompts) if at[i] < len(prompt)]
        parts = [prompts[i][at[i] : at[i] + chunk] for i in going]
        for i, part, out in zip(going, parts, run(net, parts, [states[i] for i in going]), strict=True):
            outs[i].append(out)
            at[i] += len(part)
    for ours, one_pass in zip(outs, whole, strict=True):
        assert torch.equal(torch.cat(ours), one_pass)


def test_outputs_in_another_order_of_heads(ops: TrunkOps) -> None:
    layer = layer_of(SHAPES[0], False)
    rows = torch.randn(5, layer.row)
    (plain,) = run(DeltaNet(ops, layer), [rows], [new_state(layer)])
    (moved,) = run(DeltaNet(ops, replace(layer, out_order=(0, 2, 1, 3))), [rows], [new_state(layer)])
    assert torch.equal(moved.view(5, 4, -1), plain.view(5, 4, -1)[:, [0, 2, 1, 3]])


def test_what_there_is_no_room_for_is_refused(ops: TrunkOps) -> None:
    with pytest.raises(NativeLibraryError, match="not supported"):
        DeltaNet(ops, layer_of((1, 1, 257, 8, 4), False))
    with pytest.raises(NativeLibraryError, match="not supported"):
        DeltaNet(ops, layer_of((1, 1, 8, 8, 9), False))
