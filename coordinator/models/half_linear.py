"""Linear layers in bf16 or f16 on CPUs that can't multiply in them, for many tokens at once.

Without AVX512-BF16 or AMX (most machines at home), torch multiplies 16-bit matrices one number at a time: on a Zen 3
core 32 rows of a 2048 x 2048 layer take 26.0 ms in bf16, 8.6 ms when the weight is first widened to f32. So a layer
with many rows widens its weight for that call alone and multiplies in f32, which also rounds once instead of often.
Few rows read the weight as it is: there memory is the limit, and the weight is half as large.
"""

import torch
import torch.nn.functional as F

FEW_ROWS = (
    6  # up to here torch's own product was as quick or quicker: 4 rows 3.4 against 4.7 ms, 8 rows 6.6 against 5.3
)
_HALF = (torch.bfloat16, torch.float16)


def multiplies_half() -> bool:
    """Whether this CPU has instructions for products of 16-bit floats that torch uses."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class HalfLinear(torch.nn.Linear):
    """`torch.nn.Linear` whose products of many rows are made in f32; `widen_products` turns Linears into it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` [..., in] in the weight's dtype to [..., out] in the same."""
        if input.numel() // input.shape[-1] <= FEW_ROWS or input.dtype != self.weight.dtype:
            return F.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).to(input.dtype)


def widen_products(model: torch.nn.Module) -> None:
    """Has the 16-bit Linear layers of `model` that lie on the CPU multiply many rows in f32."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype in _HALF and module.weight.device.type == "cpu":
            module.__class__ = HalfLinear
