"""The formats that a choice is made among, and what a part is rounded to when its gain is measured."""

from collections.abc import Callable
from typing import Final

from moehive.kernels.geometry import BLOCKS, Format

CANDIDATES: Final[tuple[Format, ...]] = ("q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_k", "q5_k", "q6_k", "q8_0")
PROBE: Final[Format] = "q3_k"

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def without_padding(columns: int) -> tuple[Format, ...]:
    """Those whose blocks fill rows of so many columns."""
    return tuple(fmt for fmt in CANDIDATES if columns % BLOCKS[fmt][0] == 0)
