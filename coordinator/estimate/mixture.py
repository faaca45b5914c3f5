"""What stands for a conversion within a budget: a part of each layer's experts in one format, the rest in the next.

`moehive convert --budget` chooses among the same formats for each projection, by what it harms, which nothing but the
weights tells. Its bytes are the budget's, and so are these; which experts are the larger ones changes no figure here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from moehive.kernels.geometry import Format, LayerGeometry

from .model import PARTS, Matrix, Model


def within(models: Mapping[str, Model], budget: int, formats: Iterable[Format]) -> Model:
    """The first of `models`, the best, if it takes no more than `budget` bytes; else a mixture that fills them.

    `formats`: those that a conversion chooses among; the smallest of them where even that takes more.
    """
    best = next(iter(models.values()))
    choices = sorted([best, *(best.in_format(fmt) for fmt in formats)], key=lambda model: model.total_bytes)
    fitting = [model for model in choices if model.total_bytes <= budget]
    if best in fitting:
        return best
    return _mixed(fitting[-1], choices[len(fitting)], budget) if fitting else choices[0]


def _mixed(small: Model, large: Model, budget: int) -> Model:
    """As much of `large` as fits into `budget` bytes, the rest of `small`; the trunk likewise."""
    share = (budget - small.total_bytes) / (large.total_bytes - small.total_bytes)
    trunk = replace(small, parts={part: _matrices(small, large, part, share) for part in PARTS})
    layers = _layers(small.layers, large.layers, budget - trunk.total_bytes)
    mixed = replace(trunk, layers=layers, format=f"{large.format} and {small.format}")
    part = (mixed.total_bytes - small.total_bytes) / (large.total_bytes - small.total_bytes)
    of_large = part * large.total_bytes / mixed.total_bytes
    return replace(mixed, mixture=((large.format, of_large), (small.format, 1 - of_large)))


def _matrices(small: Model, large: Model, part: str, share: float) -> tuple[Matrix, ...]:
    return tuple(
        Matrix(matrix.rows, matrix.columns, int((1 - share) * less + share * more))
        for matrix, less, more in zip(
            small.parts[part], small.matrix_bytes(part), large.matrix_bytes(part), strict=True
        )
    )


def _layers(small: Sequence[LayerGeometry], large: Sequence[LayerGeometry], room: int) -> tuple[LayerGeometry, ...]:
    """Those of `small` with as many experts of `large` as `room` bytes allow, in each layer the same share."""
    found = []
    left = sum(more.nbytes - less.nbytes for less, more in zip(small, large, strict=True))
    for less, more in zip(small, large, strict=True):
        gain = more.nbytes - less.nbytes
        count = int(less.experts * min(1.0, room / left)) if gain > 0 and left > 0 else 0
        layer = replace(less, formats=(*_formats(more)[:count], *_formats(less)[count:]))
        room -= layer.nbytes - less.nbytes
        left -= gain
        found.append(layer)
    return tuple(found)


def _formats(layer: LayerGeometry) -> list[tuple[Format, Format]]:
    specs = (layer.spec_of(expert) for expert in range(layer.experts))
    return [(spec.format, spec.back_format) for spec in specs]
