"""Rotary position embedding as the config says it: the frequencies, by transformers' own functions."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moehive.kernels.geometry import GeometryError

KNOWN = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the sequence's length


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """`inverse` f32 [n / 2]: the angle of a pair at position 1; `scaling` times cosine and sine."""

    inverse: torch.Tensor
    scaling: float

    @property
    def rotary(self) -> int:
        """Numbers of a head that are turned."""
        return 2 * len(self.inverse)


def rope_of(config: Any, head_dim: int) -> Rope:
    """The embedding of a text config whose rope_type is one of `KNOWN`; `head_dim` before any partial factor.

    Raises GeometryError for more numbers than a head has.
    """
    parameters = config.rope_parameters
    size = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if not 0 <= size <= head_dim:
        raise GeometryError(f"{size} numbers can't be turned of heads of {head_dim}.")
    if parameters["rope_type"] == "default":
        return Rope(1.0 / (parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size)), 1.0)
    inverse, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device=torch.device("cpu"))
    return Rope(inverse.float().contiguous(), float(scaling))
