"""Two small fields of the hop for nodes with slow tiers: what may be asked for next, and what is there already."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from . import experts_pb2 as pb
from .tensors import MAX_EXPERT, WireError

MAX_LIKELY = 256  # experts of a layer
MAX_AHEAD = 2  # layers
MAX_BITS_BYTES = 8192


def write_likely(request: pb.ComputeRequest, layers: Sequence[Sequence[int]]) -> None:
    """Names experts of the next layers, likeliest first; what is over MAX_AHEAD or MAX_LIKELY is left out."""
    request.likely.extend(np.array(experts[:MAX_LIKELY], dtype="<u4").tobytes() for experts in layers[:MAX_AHEAD])


def read_likely(request: pb.ComputeRequest) -> list[list[int]]:
    """The experts that the next layers may ask for, a list for each, likeliest first. Raises WireError."""
    if len(request.likely) > MAX_AHEAD:
        raise WireError(f"likely is of {len(request.likely)} layers; it is of at most {MAX_AHEAD}.")
    return [_numbers(data) for data in request.likely]


def _numbers(data: bytes) -> list[int]:
    if len(data) % 4 or len(data) > 4 * MAX_LIKELY:
        raise WireError(f"likely has {len(data)} bytes for a layer; it is at most {MAX_LIKELY} numbers.")
    experts: list[int] = np.frombuffer(data, dtype="<u4").tolist()
    if max(experts, default=0) > MAX_EXPERT:
        raise WireError("An expert's number in likely is over 65,535.")
    return experts


def write_on_disk(reply: pb.ComputeReply, experts: Collection[int]) -> None:
    """Says which experts of the layer would have to be read first; at least one byte, so that the field is there."""
    bits = np.zeros(max(experts, default=0) + 1, dtype=np.bool_)
    bits[list(experts)] = True
    reply.on_disk = np.packbits(bits, bitorder="little").tobytes()


def read_on_disk(reply: pb.ComputeReply, experts: int) -> npt.NDArray[np.bool_] | None:
    """For each of a layer's `experts` whether the node would have to read it first; None: it has all in memory.

    Raises WireError.
    """
    if not reply.on_disk:
        return None
    if len(reply.on_disk) > MAX_BITS_BYTES:
        raise WireError(f"on_disk has {len(reply.on_disk)} bytes; it has at most {MAX_BITS_BYTES}.")
    bits = np.unpackbits(np.frombuffer(reply.on_disk, dtype=np.uint8), bitorder="little", count=experts)
    return bits.astype(np.bool_)
