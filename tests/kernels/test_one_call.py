"""A layer in one native call, and the sum of rows in one, beside what torch and the calls before them give."""

import numpy as np
import pytest
import torch

from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.library import NativeLibraryError
from moehive.kernels.native import NativeExperts, add_rows, kernels

SPEC = ExpertSpec(hidden_size=70, intermediate_size=37, activation="silu", format="bf16")
OFFSETS = np.array([0, 3, 3, 5], dtype=np.uint32)  # the second token has no expert
WEIGHTS = np.array([0.5, -1.25, 2.0, 0.1, 1.0], dtype=np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("kernel", kernels())
def test_a_layer_is_its_pairs_added_and_rounded_once(make_expert, kernel, added, dtype):
    native = NativeExperts(kernel, 2)
    experts = [make_expert(SPEC, seed) for seed in range(3)]
    addresses = [experts[i].address for i in (0, 1, 2, 1, 0)]
    hidden = torch.randn(3, SPEC.hidden_size, generator=torch.Generator().manual_seed(5)).to(dtype)
    rows = native.layer(SPEC, hidden, OFFSETS, addresses, WEIGHTS, added)

    pairs = torch.empty(5, SPEC.hidden_size)
    native.pairs(SPEC, hidden.float(), OFFSETS, np.array(addresses, dtype=np.uint64), WEIGHTS, pairs)
    expected = native.sum_pairs(pairs, OFFSETS) if added else pairs
    assert rows.dtype is dtype and torch.equal(rows, expected.to(dtype))


def test_a_layer_without_an_expert_for_a_pair_is_refused(make_expert):
    native = NativeExperts(kernels()[0], 1)
    with pytest.raises(NativeLibraryError):
        native.layer(SPEC, torch.zeros(3, SPEC.hidden_size), OFFSETS, [make_expert(SPEC, 0).address] * 4 + [0],
                     WEIGHTS, True)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 7, 256, 1000])
def test_rows_are_added_in_f32_in_their_order(columns, dtype):
    generator = torch.Generator().manual_seed(columns)
    parts = [(torch.randn(2, columns, generator=generator) * 10.0**i).to(dtype) for i in (3, -3, 2)]
    raw = [bytes(part.view(torch.uint8).flatten().tolist()) for part in parts]
    total, finite = add_rows(raw, 2, columns, dtype)
    expected = parts[0].float() + parts[1].float() + parts[2].float()
    assert finite and total.dtype is dtype and torch.equal(total, expected.to(dtype))


def test_one_part_keeps_its_bits():
    part = torch.tensor([[-0.0, 0.0, 1e-42, -1.5]])
    total, finite = add_rows([part.numpy().tobytes()], 1, 4, torch.float32)
    assert finite and total.numpy().tobytes() == part.numpy().tobytes()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e19])
@pytest.mark.parametrize("place", [0, 8, 299])
def test_what_is_no_number_is_found_wherever_it_is(number, place):
    part = torch.ones(1, 300)
    part[0, place] = number
    assert not add_rows([part.numpy().tobytes()], 1, 300, torch.float32)[1]
