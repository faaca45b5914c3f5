"""Some of a request's pairs as a request of their own."""

import numpy as np
import numpy.typing as npt

from moehive.proto.tensors import Routing


def part_of(routing: Routing, mine: npt.NDArray[np.bool_]) -> Routing:
    """The pairs where `mine` [pairs] is true, in their order; the tokens stay, some perhaps without pairs."""
    ends = np.concatenate([[0], np.cumsum(mine)]).astype(np.uint32)
    return Routing(ends[routing.offsets], routing.experts[mine], routing.weights[mine])
