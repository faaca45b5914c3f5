"""16-bit linear layers whose many-row products are made in f32: nearer to exact than torch's own, same weights."""

import pytest
import torch

from moehive.coordinator.models.half_linear import FEW_ROWS, HalfLinear, widen_products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
def test_products_are_right(dtype: torch.dtype, bias: bool, rows: int) -> None:
    torch.manual_seed(rows)
    model = torch.nn.Sequential(torch.nn.Linear(96, 33, bias=bias)).to(dtype)
    weight = model[0].weight
    widen_products(model)
    assert isinstance(model[0], HalfLinear) and model[0].weight is weight and weight.dtype == dtype
    x = torch.randn(2, rows, 96).to(dtype)[:1]
    exact = torch.nn.functional.linear(x.double(), weight.double(), model[0].bias.double() if bias else None)
    out = model(x)
    assert out.dtype == dtype and out.shape == (1, rows, 33)
    step = torch.finfo(dtype).eps * exact.abs().clamp(min=1.0)  # one rounding, and one for few rows' sums
    assert bool(((out.double() - exact).abs() <= 2 * step).all())


def test_what_is_not_16_bits_or_not_a_plain_linear_stays() -> None:
    wide, embedding = torch.nn.Linear(4, 4), torch.nn.Embedding(4, 4, dtype=torch.bfloat16)
    widen_products(torch.nn.Sequential(wide, embedding))
    assert type(wide) is torch.nn.Linear and type(embedding) is torch.nn.Embedding
