"""Several operations in one call have the bits of the same operations one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.kernels.blob import empty_blob
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.fused import FusedMlp, FusedRouter
from moehive.kernels.geometry import Format, tensor_bytes
from moehive.kernels.library import NativeLibraryError
from moehive.kernels.linear import FEW_TOKENS, LinearOps, LinearWeights
from moehive.kernels.trunk_ops import RouterLayer, TrunkOps

linear, trunk = LinearOps(2), TrunkOps(2)
formats = st.sampled_from(["f32", "bf16", "q8_0", "q4_0", "q4_k"])


def matrix(format: Format, rows: int, columns: int, seed: int, bias: bool = False) -> LinearWeights:
    generator = torch.Generator().manual_seed(seed)
    blob = empty_blob(tensor_bytes(format, rows, columns))
    FORMATS[format].encode(torch.randn(rows, columns, generator=generator) / columns**0.5, blob)
    return LinearWeights(format, rows, columns, blob, torch.randn(rows, generator=generator) if bias else None)


@settings(max_examples=40, deadline=None)
@given(formats, st.integers(1, FEW_TOKENS), st.booleans(), st.booleans())
def test_a_gated_mlp(format: Format, tokens: int, shared: bool, bias: bool) -> None:
    gate, up = (matrix(format, 512, 256, seed, bias) for seed in (1, 2))
    down = matrix(format, 256, 512, 3, bias)
    share = matrix("f32", 1, 256, 4) if shared else None
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(tokens))
    out, taken = FusedMlp(trunk, gate, up, down, "silu", share)(x)
    middle = torch.empty(tokens, 512)
    trunk.gate(linear.linears([gate, up], x), "silu", middle)
    assert torch.equal(out, linear.linear(down, middle))
    if share is None:
        assert taken is None
    else:
        assert taken is not None and torch.equal(taken, linear.linear(share, x)[:, 0])


@settings(max_examples=20, deadline=None)
@given(formats, st.integers(1, FEW_TOKENS), st.sampled_from(["softmax", "sigmoid", "chosen_softmax"]))
def test_a_router(format: Format, tokens: int, scores: str) -> None:
    weights = matrix(format, 64, 256, 5)
    layer = RouterLayer(experts=64, top_k=6, scores=scores, renormalize=True)  # type: ignore[arg-type]  # one of them
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(tokens))
    ids, chosen = torch.empty(tokens, 6, dtype=torch.int64), torch.empty(tokens, 6)
    wanted_ids, wanted = torch.empty_like(ids), torch.empty_like(chosen)
    FusedRouter(trunk, weights, layer)(x, ids, chosen)
    trunk.route(layer.structure(), linear.linear(weights, x), wanted_ids, wanted)
    assert torch.equal(ids, wanted_ids) and torch.equal(chosen, wanted)


def test_matrices_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(1, 256)
    narrow = FusedMlp(trunk, matrix("f32", 64, 256, 1), matrix("f32", 32, 256, 2), matrix("f32", 256, 64, 3), "silu")
    with pytest.raises(NativeLibraryError, match="refuses"):
        narrow(x)
    layer = RouterLayer(experts=65, top_k=6, scores="softmax", renormalize=True)
    with pytest.raises(NativeLibraryError, match="refuses"):
        FusedRouter(trunk, matrix("f32", 64, 256, 5), layer)(
            x, torch.empty(1, 6, dtype=torch.int64), torch.empty(1, 6)
        )
