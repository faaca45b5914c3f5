"""The trunk's kernels for a GPU: against the CPU's own, which are tested against transformers, and against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.kernels.blob import empty_blob
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import tensor_bytes
from moehive.kernels.gpu import pages
from moehive.kernels.gpu.attention import GpuAttention
from moehive.kernels.gpu.batch import DeviceBatch, Rows
from moehive.kernels.gpu.experts import empty
from moehive.kernels.gpu.from_blob import linear_bytes
from moehive.kernels.gpu.linear import GpuLinears
from moehive.kernels.gpu.planes import ALIGNMENT, BLOCK_COLUMNS, PlanesError
from moehive.kernels.gpu.rows import add_norm, gate, route
from moehive.kernels.linear import LinearWeights
from moehive.kernels.trunk_ops import AttentionLayer, RouterLayer, TrunkOps, sequences

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = TrunkOps(1)


def cut(numbers: torch.Tensor) -> torch.Tensor:
    """f32 numbers as a kernel stores them in bf16: the nearest ones (Triton's interpreter rounds down)."""
    if DEVICE.type == "cuda":
        return numbers.to(torch.bfloat16)
    return (numbers.view(torch.int32) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 33, 4100])
@pytest.mark.parametrize("half", [False, True])
def test_what_is_added_and_normed(width: int, half: bool) -> None:
    hidden, more, share, norm = (
        random(3, width),
        random(3, width, seed=1),
        random(3, 2, seed=2),
        random(width, seed=3),
    )
    add = random(3, width, seed=4).to(torch.bfloat16 if half else torch.float32)
    mine = hidden.to(DEVICE, copy=True)
    out = torch.empty_like(mine)
    rounded = torch.empty(3, width, dtype=torch.bfloat16, device=DEVICE)
    on = [tensor.to(DEVICE) for tensor in (add, more, share, norm)]
    add_norm(mine, on[3], 1e-5, out, on[0], on[1], on[2][:, 1], rounded)
    expected = hidden + add.float() + more * share[:, 1:].sigmoid()
    torch.testing.assert_close(mine.cpu(), expected)
    normed = torch.nn.functional.rms_norm(expected, (width,), norm, 1e-5)
    torch.testing.assert_close(out.cpu(), normed)
    assert torch.equal(rounded, cut(out))
    add_norm(mine, on[3], 1e-5, out)
    torch.testing.assert_close(mine.cpu(), expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gate(activation: str) -> None:
    rows = random(3, 2 * 1030)
    expected, out = torch.empty(3, 1030), torch.empty(3, 1030, device=DEVICE)
    OPS.gate(rows, activation, expected)  # type: ignore[arg-type]
    gate(rows.to(DEVICE), activation, out)  # type: ignore[arg-type]
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    scores=st.sampled_from(["softmax", "sigmoid", "chosen_softmax"]),
    renormalize=st.booleans(),
    bias=st.booleans(),
    groups=st.sampled_from([(1, 1, 12), (1, 1, 7), (4, 2, 12), (3, 1, 12), (2, 2, 10)]),
    top_k=st.integers(1, 4),
    tokens=st.integers(1, 40),
)
def test_the_choice_of_experts_is_the_cpus(scores, renormalize, bias, groups, top_k, tokens):  # type: ignore[no-untyped-def]
    count, top, experts = groups
    router = RouterLayer(
        experts=experts, top_k=min(top_k, top * experts // count), scores=scores, renormalize=renormalize,
        bias=random(experts, seed=tokens) / 9 if bias else None, groups=count, top_groups=top, scaling=2.5,
    )  # fmt: skip
    logits = random(tokens, experts, seed=top_k)
    shape = tokens, router.top_k
    ids, weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
    OPS.route(router.structure(), logits, ids, weights)
    my_ids, mine = torch.empty(shape, dtype=torch.int64, device=DEVICE), torch.empty(shape, device=DEVICE)
    route(router, None if router.bias is None else router.bias.to(DEVICE), logits.to(DEVICE), my_ids, mine)
    assert torch.equal(my_ids.cpu(), ids)
    torch.testing.assert_close(mine.cpu(), weights, rtol=1e-5, atol=1e-6)


def test_the_lower_number_wins_a_tie() -> None:
    router = RouterLayer(experts=6, top_k=3, scores="softmax", renormalize=True)
    ids, weights = torch.empty(1, 3, dtype=torch.int64, device=DEVICE), torch.empty(1, 3, device=DEVICE)
    route(router, None, torch.zeros(1, 6, device=DEVICE), ids, weights)
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("half", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("splits", [1, 4])
def test_attention_is_the_cpus(half: bool, window: int | None, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long pass into pages that lie anywhere, then some tokens of two sequences, one row having none."""
    monkeypatch.setattr(pages, "_PROGRAMS", splits * 4)
    dtype = torch.bfloat16 if half else torch.float32
    layer = AttentionLayer(
        heads=6, kv_heads=2, head_dim=12, rotary=8, scale=0.4, page_at=64, dtype=dtype, window=window, gated=True,
        query_norm=random(12, seed=1), key_norm=random(12, seed=2), sinks=random(6, seed=3),
    )  # fmt: skip
    mine = GpuAttention(layer, 0, DEVICE)
    lengths = (70, 34)  # of the 96 that their pages have room for
    cpu_pages = [[empty_blob(64 + layer.page_bytes) for _ in range(3)] for _ in range(2)]
    my_pages = [[empty(len(page), DEVICE) for page in some] for some in cpu_pages]  # laid out otherwise
    addresses = [np.array([page.data_ptr() for page in some], dtype=np.int64) for some in cpu_pages]
    base = empty(ALIGNMENT, DEVICE)
    table = torch.tensor([[page.data_ptr() - base.data_ptr() for page in some] for some in my_pages], device=DEVICE)

    def both(places: list[tuple[int, int, int]], whole: bool, spare: int) -> None:
        """`places`: of each sequence its first row, its tokens and their first position."""
        count = sum(n for _, n, _ in places)
        rows = random(count, layer.row, seed=count)
        batch = sequences([(*place, addresses[n].ctypes.data) for n, place in enumerate(places)])
        cos, sin = OPS.rope(batch, 1.0 / 100 ** (torch.arange(4) / 4), 1.0)
        expected = torch.empty(count, 6 * 12)
        my_rows = torch.zeros(count + spare, layer.row)
        my_rows[:count] = rows
        OPS.attend(layer.structure(), rows, batch, cos, sin, expected)
        owners = [n for n, (_, some, _) in enumerate(places) for _ in range(some)] + [0] * spare
        positions = [start + i for _, some, start in places for i in range(some)] + [-1] * spare
        padding = torch.zeros(spare, 4)
        out = mine(
            my_rows.to(DEVICE),
            DeviceBatch(
                base=base,
                sequences=torch.tensor(owners, device=DEVICE),
                positions=torch.tensor(positions, device=DEVICE),
                firsts=torch.tensor([first for first, _, _ in places], device=DEVICE),
                counts=torch.tensor([some for _, some, _ in places], device=DEVICE),
                tables=[table],
                states=torch.zeros(2, 0, dtype=torch.int64, device=DEVICE),
                cos=torch.cat([cos, padding]).to(DEVICE),
                sin=torch.cat([sin, padding]).to(DEVICE),
                whole=[Rows(*place) for place in places] if whole else None,
            ),
        )
        # Keys, and queries of the GPU's few tokens, are rounded to 8 bits.
        near = {"rtol": 0.02, "atol": 0.02} if half else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(out[:count].cpu(), expected, **near)
        assert spare == 0 or (out[count:] == 0).all()

    both([(0, lengths[0], 0), (lengths[0], lengths[1], 0)], whole=True, spare=0)
    both([(0, 1, lengths[0]), (1, 2, lengths[1])], whole=False, spare=1)


def linear_weights(fmt: str, rows: int, columns: int, seed: int, bias: bool = False) -> LinearWeights:
    numbers = random(rows, columns, seed=seed)
    blob = empty_blob(tensor_bytes(fmt, rows, columns))
    FORMATS[fmt].encode(numbers, blob)
    return LinearWeights(fmt, rows, columns, blob, random(rows, seed=9) if bias else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", BLOCK_COLUMNS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_layers_of_one_input_are_a_row(fmt: str, tokens: int) -> None:
    columns = max(BLOCK_COLUMNS[fmt], 64)
    layers = [
        linear_weights(fmt, 128, columns, 1),
        linear_weights(fmt, 40, columns, 2, bias=True),
        linear_weights("f32", 3, columns, 3),
        linear_weights(fmt, 8, columns, 4),
    ]
    x = random(tokens, columns)
    wide = torch.empty(tokens, 179 + 5, device=DEVICE)
    out = GpuLinears(layers, DEVICE)(x.to(DEVICE), wide[:, :179])
    assert out.data_ptr() == wide.data_ptr()
    expected = torch.cat([x @ one.matrix.T + (0 if one.bias is None else one.bias) for one in layers], 1)
    terms = torch.cat([x.abs() @ one.matrix.abs().T for one in layers], 1)
    near = 2e-6 if fmt == "f32" or tokens == 1 else 2.02 * 2.0**-7  # both factors are rounded to bf16
    assert ((out.cpu() - expected).abs() <= near * terms + 1e-5).all()


def test_the_bytes_of_a_layer_are_known_before() -> None:
    weights = linear_weights("q8_0", 40, 64, 1, bias=True)
    assert linear_bytes(weights) == 40 * 64 + 128 * -(-40 * 64 // 32 * 2 // 128) + 4 * 40
    with pytest.raises(PlanesError, match="no GPU kernel for weights in q5_k"):
        linear_bytes(linear_weights("q5_k", 16, 256, 1))
