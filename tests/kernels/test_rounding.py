"""The native rounding finds what the method finds when it is written with whole tensors, column after column."""

from dataclasses import dataclass

import gguf
import pytest
import torch

from moehive.kernels.geometry import BLOCKS
from moehive.kernels.quantizers.feedback import SUB_BLOCKS, Moments, quantize

IQ4 = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]).float()
TRIES = range(-6, 7)
TINY = 1e-30


@dataclass(frozen=True)
class Grid:
    levels: int
    scale_range: tuple[int, int]
    minimum_range: int = 0
    offset: int = 0
    table: bool = False

    def nearest(
        self, numbers: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest numbers that can be expressed, and those without scale and minimum."""
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        if self.table:
            plain = IQ4[torch.bucketize(numbers * inverse, (IQ4[1:] + IQ4[:-1]) / 2)]
        else:
            code = ((numbers + minimum) * inverse + self.offset).round().clamp(0, self.levels - 1)
            plain = code - self.offset
        return plain * scale - minimum, plain

    def fit(self, numbers: torch.Tensor, importance: torch.Tensor, sub: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A scale and a minimum for each column of a block: `numbers` [rows, columns], `importance` [columns]."""
        x = numbers.reshape(len(numbers), -1, sub)
        size = (x.square().mean(2, keepdim=True) + x.square()).sqrt()
        w = importance.view(1, -1, sub) * size.clamp_min(TINY)
        if self.minimum_range:
            scale, minimum = both(x, w, self.levels - 1)
            d = (scale.amax(1) / self.scale_range[1]).half().float()[:, None]
            m = (minimum.amax(1) / self.minimum_range).half().float()[:, None]
            scale = d * integers(scale, d, 0, self.scale_range[1])
            minimum = m * integers(minimum, m, 0, self.minimum_range)
            return scale.repeat_interleave(sub, 1), minimum.repeat_interleave(sub, 1)
        scale = self.search(x, w)
        low, high = self.scale_range
        if low == high == 1:
            scale = scale.half().float()
        else:
            most = scale.gather(1, scale.abs().argmax(1, keepdim=True)) / low
            d = most.half().float()
            d = torch.where((d == 0) & (most != 0), torch.copysign(d + 2.0**-24, most), d)
            scale = d * integers(scale, d, low, high)
        return scale.repeat_interleave(sub, 1), torch.zeros_like(numbers)

    def search(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        most = x.gather(2, x.abs().argmax(2, keepdim=True))
        far = -127 if self.table else -self.offset
        step = 127 / 80 if self.table else 0.1
        best_gain, best = torch.full(x.shape[:2], -1.0), torch.zeros(x.shape[:2])
        for number in TRIES:
            _, plain = self.nearest(x, most / (far + step * number))
            cross, square = (w * x * plain).sum(2), (w * plain * plain).sum(2).clamp_min(TINY)
            gain = cross.square() / square
            best = torch.where(gain > best_gain, cross / square, best)
            best_gain = torch.maximum(gain, best_gain)
        return best


def integers(factors: torch.Tensor, unit: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (factors * torch.where(unit == 0, 0.0, 1 / unit)).round().clamp(low, high)


def both(x: torch.Tensor, w: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For number = scale * code - minimum: both of each sub-block."""
    low, high = x.amin(2, keepdim=True).clamp_max(0), x.amax(2, keepdim=True).clamp_min(0)
    sum_w, sum_x = w.sum(2), (w * x).sum(2)
    best = torch.stack([torch.full(x.shape[:2], torch.inf), *torch.zeros(2, *x.shape[:2])])
    for number in TRIES:
        span = (high - low) / (top + 0.1 * number * min(1.0, top / 7))
        code = ((x - low) * torch.where(span == 0, 0.0, 1 / span)).round().clamp(0, top)
        sum_c, sum_cc, sum_xc = (w * code).sum(2), (w * code * code).sum(2), (w * x * code).sum(2)
        determinant = sum_w * sum_cc - sum_c * sum_c
        safe = torch.where(determinant > 0, determinant, 1.0)
        scale = (sum_w * sum_xc - sum_x * sum_c) / safe
        minimum = -(sum_cc * sum_x - sum_c * sum_xc) / safe
        alone = (determinant <= 0) | (minimum < 0)
        scale = torch.where(alone, sum_xc / sum_cc.clamp_min(TINY), scale).clamp_min(0)
        minimum = torch.where(alone, torch.where(sum_cc == 0, -sum_x / sum_w, 0.0), minimum).clamp_min(0)
        error = (w * (scale[:, :, None] * code - minimum[:, :, None] - x).square()).sum(2)
        best = torch.where(error < best[0], torch.stack([error, scale, minimum]), best)
    return best[1], best[2]


GRIDS = {
    "q2_k": Grid(4, (0, 15), 15), "q3_k": Grid(8, (-32, 31), offset=4), "iq4_xs": Grid(16, (-32, 31), table=True),
    "q4_k": Grid(16, (0, 63), 63), "q5_k": Grid(32, (0, 63), 63), "q6_k": Grid(64, (-128, 127), offset=32),
    "q8_0": Grid(256, (1, 1), offset=128), "iq4_nl": Grid(16, (1, 1), table=True),
}  # fmt: skip


def reference(name: str, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
    """What the rounded matrix says, f32 [rows, columns]."""
    columns, grid = BLOCKS[name][0], GRIDS[name]
    left = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns))
    importance = torch.ones(left.shape[1]) if moments is None else moments.importance
    factor = None if moments is None else moments.factor
    rounded = torch.empty_like(left)
    for start in range(0, left.shape[1], columns):
        here = slice(start, start + columns)
        scale, minimum = grid.fit(left[:, here], importance[here], SUB_BLOCKS[name])
        if factor is None:
            rounded[:, here], _ = grid.nearest(left[:, here], scale, minimum)
            continue
        for column in range(start, start + columns):
            own = scale[:, column - start], minimum[:, column - start]
            rounded[:, column], _ = grid.nearest(left[:, column], *own)
            error = (left[:, column] - rounded[:, column]) / factor[column, column]
            left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 : left.shape[1]]
    return rounded[:, : weight.shape[1]]


def native(name: str, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
    rows = quantize(name, weight, moments)
    numbers = torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    return numbers[:, : weight.shape[1]]


@pytest.mark.parametrize("known", ["nothing", "sizes", "all"])
@pytest.mark.parametrize("name", list(GRIDS))
def test_as_with_whole_tensors(name: str, known: str) -> None:
    """Sums are added in another order there: a factor may differ in its last bit, and with it a whole block."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(37, 600, generator=generator) * 0.02
    weight[3] = 0
    weight[4, 300:] *= 30
    x = torch.randn(400, 40, generator=generator) @ torch.randn(40, 600, generator=generator)
    x += 0.5 * torch.randn(400, 600, generator=generator)
    second = x.T @ x / len(x)
    moments = {"nothing": None, "sizes": Moments.diagonal(second.diagonal()), "all": Moments.of(second)}[known]
    ours, theirs = native(name, weight, moments), reference(name, weight, moments)
    first = BLOCKS[name][0] if known == "all" else 600  # what differs changes all that comes after it in its row
    assert float((ours == theirs)[:, :first].float().mean()) > 0.8
    error = (((numbers - weight) @ x.T).square().sum() for numbers in (ours, theirs))
    torch.testing.assert_close(next(error), next(error), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("name", list(GRIDS))
def test_threads_and_neighbours_change_no_bit(name: str) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(75, 512, generator=generator)
    x = torch.randn(700, 512, generator=generator)
    moments = Moments.of(x.T @ x)
    alone = torch.cat([quantize(name, row[None], moments) for row in weight])
    assert torch.equal(quantize(name, weight, moments), alone)
    torch.set_num_threads(2)
    assert torch.equal(quantize(name, weight, moments), alone)
