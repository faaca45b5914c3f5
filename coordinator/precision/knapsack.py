"""Which format for each part, so that the damage is least and the bytes are kept: a multiple-choice knapsack.

The relaxation, in which a part may be split between two formats, is solved exactly: on each part's lower convex
hull, the steps that buy most for a byte come first. It bounds every solution from below. Stopping before the step
that does not fit, and then spending what is left on the best steps that do, loses at most the value of one step: with
thousands of parts nothing that matters, and it is stated.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One format for a part: its bytes and the damage that it does."""

    nbytes: int
    damage: float


class Choice(NamedTuple):
    """The option's number for each part; bytes and damage of all; no choice does less damage than `bound`."""

    picks: tuple[int, ...]
    nbytes: int
    damage: float
    bound: float


def choose(parts: Sequence[Sequence[Option]], budget: int) -> Choice | None:
    """The least damage within `budget` bytes; None if the smallest options alone are more."""
    hulls = [_hull(options) for options in parts]
    picks = [hull[0] for hull in hulls]
    nbytes = sum(options[pick].nbytes for options, pick in zip(parts, picks, strict=True))
    if nbytes > budget:
        return None
    steps = sorted(
        (_slope(parts[part], hull[place], hull[place + 1]), part, place)
        for part, hull in enumerate(hulls)
        for place in range(len(hull) - 1)
    )
    damage = sum(options[pick].damage for options, pick in zip(parts, picks, strict=True))
    bound: float | None = None
    for slope, part, place in steps:
        options, hull = parts[part], hulls[part]
        if picks[part] != hull[place]:
            continue  # the step before it did not fit
        old, new = options[hull[place]], options[hull[place + 1]]
        if nbytes + new.nbytes - old.nbytes <= budget:
            picks[part] = hull[place + 1]
            nbytes += new.nbytes - old.nbytes
            damage += new.damage - old.damage
        elif bound is None:
            bound = damage + slope * (budget - nbytes)
    damage = sum(options[pick].damage for options, pick in zip(parts, picks, strict=True))  # without rounding errors
    return Choice(tuple(picks), nbytes, damage, damage if bound is None else min(bound, damage))


def _slope(options: Sequence[Option], low: int, high: int) -> float:
    return (options[high].damage - options[low].damage) / (options[high].nbytes - options[low].nbytes)


def _hull(options: Sequence[Option]) -> list[int]:
    """Options of the lower convex hull, from the smallest on, each doing less damage than the one before."""
    hull: list[int] = []
    for number in sorted(range(len(options)), key=lambda n: options[n]):
        option = options[number]
        if hull and option.damage >= options[hull[-1]].damage:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) >= _slope(options, hull[-1], number):
            hull.pop()
        hull.append(number)
    return hull
