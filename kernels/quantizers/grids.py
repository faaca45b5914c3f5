"""The numbers that a block format can express: fitting a block's scales to weights, and the nearest codes.

A block of a row has sub-blocks, each with a scale and, in some formats, a minimum; both are small integers times the
block's own factor of 16 bits (llama.cpp's K-quants and IQ4_XS; ggml-common.h says how they are stored):

    number = scale * code - minimum            q2_k, q4_k, q5_k
    number = scale * (code - offset)           q3_k, q6_k, q8_0
    number = scale * table[code]               iq4_xs, iq4_nl

Which column matters how much is a weight of its own, as in llama.cpp's importance matrix: the mean square of what the
column is multiplied with. The scale of a sub-block is searched: some roundings are tried, each with the scale that
fits it best by weighted least squares, and the best one counts.
"""

from dataclasses import dataclass
from typing import Final

import torch

_STEPS = 6  # roundings that are tried for a sub-block's scale, to each side of the plain one
_TINY = 1e-30
_SMALLEST = 2.0**-24  # above 0, of 16 bits


@dataclass(frozen=True, slots=True)
class Fit:
    """Factors of one block of some rows; `scale` and `minimum` f32 [rows, sub-blocks] are what a reader multiplies.

    `d` and `m` f16 [rows]; `scales` and `minimums` int32 [rows, sub-blocks], without d and m.
    """

    d: torch.Tensor
    scales: torch.Tensor
    scale: torch.Tensor
    m: torch.Tensor | None = None
    minimums: torch.Tensor | None = None
    minimum: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Grid:
    """One format. `columns` of a block, `sub` of a sub-block, codes from 0 to `levels` - 1."""

    name: str
    columns: int
    sub: int
    levels: int
    scale_range: tuple[int, int]  # of a sub-block's integer
    minimum_range: int = 0  # the largest; 0: there is no minimum
    offset: int = 0
    table: tuple[int, ...] | None = None

    def fit(self, numbers: torch.Tensor, importance: torch.Tensor) -> Fit:
        """Scales for `numbers` f32 [rows, columns], one block; `importance` f32 [columns], above 0."""
        rows = len(numbers)
        x = numbers.view(rows, -1, self.sub)
        # Large numbers count more than small ones beside them, as in llama.cpp: an error of theirs is felt elsewhere.
        size = (x.square().mean(2, keepdim=True) + x.square()).sqrt()
        w = importance.view(1, -1, self.sub) * size.clamp_min(_TINY)
        if self.minimum_range:
            scale, minimum = _scale_and_minimum(x, w, self.levels - 1)
            d = (scale.amax(1) / self.scale_range[1]).half()
            m = (minimum.amax(1) / self.minimum_range).half()
            scales = _integers(scale, d, 0, self.scale_range[1])
            minimums = _integers(minimum, m, 0, self.minimum_range)
            return Fit(d, scales, d.float()[:, None] * scales, m, minimums, m.float()[:, None] * minimums)
        scale = self._scale(x, w)
        low, high = self.scale_range
        if low == high == 1:  # no integers: the block is one sub-block
            d = scale[:, 0].half()
            scales = torch.ones_like(scale, dtype=torch.int32)
            return Fit(d, scales, d.float()[:, None] * scales)
        most = scale.gather(1, scale.abs().argmax(1, keepdim=True))[:, 0]
        d = (most / low).half()  # the integer of the largest scale is `low`, which reaches one further than `high`
        d = torch.where((d == 0) & (most != 0), torch.copysign(d + _SMALLEST, most / low).half(), d)
        scales = _integers(scale, d, low, high)
        return Fit(d, scales, d.float()[:, None] * scales)

    def codes(self, numbers: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        """The nearest codes, uint8, of f32 `numbers`; `scale` and `minimum` broadcast against them."""
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        if self.table is not None:
            table = torch.tensor(self.table, dtype=torch.float32)
            return torch.bucketize(numbers * inverse, (table[1:] + table[:-1]) / 2).to(torch.uint8)
        shifted = numbers if minimum is None else numbers + minimum
        return (shifted * inverse + self.offset).round().clamp(0, self.levels - 1).to(torch.uint8)

    def numbers(self, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        """What `codes` mean, f32."""
        if self.table is not None:
            return torch.tensor(self.table, dtype=torch.float32)[codes.long()] * scale
        plain = (codes.float() - self.offset) * scale
        return plain if minimum is None else plain - minimum

    def _scale(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The best scale of each sub-block, f32 [rows, sub-blocks], of either sign."""
        most = x.gather(2, x.abs().argmax(2, keepdim=True))
        # The code that reaches furthest: a symmetric grid has one code more below 0 than above.
        far = -self.offset if self.table is None else self.table[0]
        step = 0.1 if self.table is None else -far / 80
        best_gain = torch.full(x.shape[:2], -1.0)
        best = torch.zeros(x.shape[:2])
        for number in range(-_STEPS, _STEPS + 1):
            scale = most / (far + step * number)
            code = self.numbers(self.codes(x, scale, None), torch.ones(()), None)
            cross, square = (w * x * code).sum(2), (w * code * code).sum(2)
            gain = cross.square() / square.clamp_min(_TINY)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, cross / square.clamp_min(_TINY), best)
        return best


def _integers(factors: torch.Tensor, unit: torch.Tensor, low: int, high: int) -> torch.Tensor:
    unit = unit.float()[:, None]
    return (factors * torch.where(unit == 0, 0.0, 1 / unit)).round().clamp(low, high).int()


def _scale_and_minimum(x: torch.Tensor, w: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For number = scale * code - minimum with codes 0 to `top`: both >= 0, f32 [rows, sub-blocks]."""
    low, high = x.amin(2, keepdim=True).clamp_max(0), x.amax(2, keepdim=True).clamp_min(0)
    sum_w, sum_x = w.sum(2), (w * x).sum(2)
    best_error = torch.full(x.shape[:2], torch.inf)
    best_scale, best_minimum = torch.zeros(x.shape[:2]), torch.zeros(x.shape[:2])
    for number in range(-_STEPS, _STEPS + 1):
        span = (high - low) / (top + 0.1 * number * min(1.0, top / 7))
        code = ((x - low) * torch.where(span == 0, 0.0, 1 / span)).round().clamp(0, top)
        sum_c, sum_cc, sum_xc = (w * code).sum(2), (w * code * code).sum(2), (w * x * code).sum(2)
        determinant = sum_w * sum_cc - sum_c * sum_c
        safe = torch.where(determinant > 0, determinant, 1.0)
        scale = (sum_w * sum_xc - sum_x * sum_c) / safe
        minimum = -(sum_cc * sum_x - sum_c * sum_xc) / safe
        # One code for all, or a minimum that can't be stored: a scale without one; all codes 0: the mean alone.
        alone = (determinant <= 0) | (minimum < 0)
        scale = torch.where(alone, sum_xc / sum_cc.clamp_min(_TINY), scale).clamp_min(0)
        minimum = torch.where(alone, torch.where(sum_cc == 0, -sum_x / sum_w, 0.0), minimum).clamp_min(0)
        error = (w * (scale[:, :, None] * code - minimum[:, :, None] - x).square()).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


IQ4: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

GRIDS: Final = {
    grid.name: grid
    for grid in (
        Grid("q2_k", 256, 16, 4, (0, 15), 15),
        Grid("q3_k", 256, 16, 8, (-32, 31), offset=4),
        Grid("iq4_xs", 256, 32, 16, (-32, 31), table=IQ4),
        Grid("q4_k", 256, 32, 16, (0, 63), 63),
        Grid("q5_k", 256, 32, 32, (0, 63), 63),
        Grid("q6_k", 256, 16, 64, (-128, 127), offset=32),
        Grid("q8_0", 32, 32, 256, (1, 1), offset=128),
        Grid("iq4_nl", 32, 32, 16, (1, 1), table=IQ4),
    )
}
