"""Two small fields of the hop for nodes with slow tiers: what may be asked for next, and what is there already."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from . import experts_pb2 as pb
from .tensors import MAX_EXPERT, WireError

MAX_LIKELY = 256
MAX_BITS_BYTES = 8192


def write_likely(request: pb.ComputeRequest, experts: Sequence[int]) -> None:
    """Names experts of the next layer, likeliest first; more than MAX_LIKELY are left out."""
    request.likely = np.array(experts[:MAX_LIKELY], dtype="<u4").tobytes()


def read_likely(request: pb.ComputeRequest) -> list[int]:
    """The experts that the next layer may ask for, likeliest first. Raises WireError."""
    if not request.likely:
        return []
    if len(request.likely) % 4 or len(request.likely) > 4 * MAX_LIKELY:
        raise WireError(f"likely has {len(request.likely)} bytes; it is at most {MAX_LIKELY} numbers.")
    experts: list[int] = np.frombuffer(request.likely, dtype="<u4").tolist()
    if max(experts) > MAX_EXPERT:
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
