"""Requests and replies of the hop as tensors: raw little-endian bytes, every size checked before use; no pickle."""

import ctypes
import struct
import sys
import warnings
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch

from . import experts_pb2 as pb
from .varint import varint

MAX_TOKENS = 8192
MAX_HIDDEN = 65_536
MAX_LAYER = 1023
MAX_TENSOR_BYTES = 64 << 20
MAX_PAIRS_PER_TOKEN = 64
MAX_EXPERT = 65_535

# Columns of a row in 8 bits that share a scale. Hidden states have a few columns far larger than the rest: with one
# scale for a whole row, all others would be rounded away.
SCALE_COLUMNS = 64
# Of the bytes on the wire. int8 rows come with their scales and are f32 once read.
DTYPES: dict[pb.Dtype, torch.dtype] = {
    pb.DTYPE_F32: torch.float32,
    pb.DTYPE_BF16: torch.bfloat16,
    pb.DTYPE_INT8: torch.int8,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

if sys.byteorder != "little":
    raise ImportError("Moehive's wire is little-endian; this machine is not.")


class WireError(ValueError):
    """A message outside its bounds; its text is one sentence."""


class Routing(NamedTuple):
    """CSR lists: the pairs of token t are [offsets[t], offsets[t + 1])."""

    offsets: np.ndarray  # uint32 [tokens + 1]
    experts: np.ndarray  # uint32 [pairs]
    weights: np.ndarray  # f32 [pairs]


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A CPU tensor's bytes in order (one copy, if it is contiguous)."""
    # Not `contiguous` alone: even where it has nothing to do, torch's way there is long and seldom in a cache.
    flat = tensor if tensor.is_contiguous() else tensor.contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.nbytes)  # half the cost of a view, an array and its bytes


# Tensors below are views of a message's bytes, which nobody else holds and which are only read. Torch has no such
# kind of tensor and says so once.
warnings.filterwarnings("ignore", "The given (buffer|NumPy array) is not writable", UserWarning)


def _tensor(data: bytes, dtype: torch.dtype, rows: int, columns: int, what: str) -> torch.Tensor:
    if rows * columns * dtype.itemsize != len(data):
        raise WireError(f"{what} has {len(data)} bytes where [{rows}, {columns}] of {dtype} was announced.")
    if not data:  # a reply of no rows
        return torch.empty((rows, columns), dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(rows, columns)  # CPython's bytes are aligned to 16


def _to_int8(tensor: torch.Tensor) -> tuple[bytes, bytes]:
    """Rows [rows, columns] as int8 bytes, and f32 scale bytes [rows, groups]: a group's largest number becomes 127.

    A group with a value that is not finite gets a scale that is not, so the other side refuses it.
    """
    rows, columns = tensor.shape
    groups = scale_groups(columns)
    values = tensor.float()
    if columns % SCALE_COLUMNS:
        values = torch.nn.functional.pad(values, (0, groups * SCALE_COLUMNS - columns))
    values = values.view(rows, groups, SCALE_COLUMNS)
    scales = values.abs().amax(dim=2).div_(127)
    steps = values / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]
    return tensor_bytes(steps.round_().to(torch.int8).view(rows, -1)[:, :columns]), tensor_bytes(scales)


def _from_int8(data: bytes, scales: bytes, rows: int, columns: int, what: str) -> torch.Tensor:
    steps = _tensor(data, torch.int8, rows, columns, what)
    factors = _tensor(scales, torch.float32, rows, scale_groups(columns), f"scales of {what}")
    if not bool(torch.isfinite(factors).all()):
        raise WireError(f"A scale of {what} is not finite.")
    if columns % SCALE_COLUMNS:
        return steps * factors.repeat_interleave(SCALE_COLUMNS, dim=1)[:, :columns]
    values = steps.float().view(rows, -1, SCALE_COLUMNS)
    return values.mul_(factors[:, :, None]).view(rows, columns)


def scale_groups(columns: int) -> int:
    """Scales of a row of `columns` numbers in 8 bits."""
    return -(-columns // SCALE_COLUMNS)


def read_request(request: pb.ComputeRequest) -> tuple[torch.Tensor, Routing]:
    """Hidden states [tokens, hidden], f32 or bf16, and routing of a request. Raises WireError."""
    tokens, hidden = request.tokens, request.hidden_size
    if not 1 <= tokens <= MAX_TOKENS or not 1 <= hidden <= MAX_HIDDEN or request.layer > MAX_LAYER:
        raise WireError(f"tokens ({tokens}), hidden_size ({hidden}) or layer ({request.layer}) is out of bounds.")
    if request.reduction not in (pb.REDUCTION_PARTIAL_SUM, pb.REDUCTION_PER_EXPERT):
        raise WireError(f"Unknown reduction {request.reduction}.")
    dtype = DTYPES.get(request.dtype)
    if dtype is None:
        raise WireError(f"Unknown dtype {request.dtype}.")
    if dtype is torch.int8 and request.reduction == pb.REDUCTION_PER_EXPERT:
        raise WireError("8-bit hidden states have no exact rows: REDUCTION_PER_EXPERT needs another dtype.")
    size = 4 if dtype is torch.int8 else dtype.itemsize  # what it is once read
    if tokens * hidden * size > MAX_TENSOR_BYTES:
        raise WireError(f"[{tokens}, {hidden}] of {dtype} is over {MAX_TENSOR_BYTES} bytes.")
    routing = read_routing(request, tokens)
    pairs = len(routing.experts)
    rows = pairs if request.reduction == pb.REDUCTION_PER_EXPERT else tokens
    if rows * hidden * size > MAX_TENSOR_BYTES:
        raise WireError(f"The reply, [{rows}, {hidden}] of {dtype}, would be over {MAX_TENSOR_BYTES} bytes.")
    if dtype is torch.int8:
        states = _from_int8(request.hidden_states, request.scales, tokens, hidden, "hidden_states")
    else:
        states = _tensor(request.hidden_states, dtype, tokens, hidden, "hidden_states")
    return states, routing


def read_routing(message: pb.ComputeRequest | pb.ChainNode, tokens: int) -> Routing:
    """The routing of `tokens` tokens. Raises WireError."""
    offset_bytes, expert_bytes, weight_bytes = message.offsets, message.experts, message.weights
    if len(offset_bytes) != 4 * (tokens + 1):
        raise WireError(f"offsets has {len(offset_bytes)} bytes for {tokens} tokens.")
    offsets = np.frombuffer(offset_bytes, dtype="<u4")
    if tokens == 1:  # the case of every decode step: plain numbers are quicker than arrays of so few
        first, pairs = struct.unpack("<2I", offset_bytes)
        rising = pairs >= first
    else:
        first, pairs = int(offsets[0]), int(offsets[-1])
        rising = bool((offsets[1:] >= offsets[:-1]).all())
    if first != 0 or not rising or pairs > MAX_PAIRS_PER_TOKEN * tokens:
        raise WireError("offsets must start at 0, never decrease and list at most 64 experts a token.")
    if len(expert_bytes) != 4 * pairs or len(weight_bytes) != 4 * pairs:
        raise WireError(f"experts and weights must have {pairs} entries, as offsets says.")
    experts = np.frombuffer(expert_bytes, dtype="<u4")
    weights = np.frombuffer(weight_bytes, dtype="<f4")
    if tokens == 1:
        valid = max(struct.unpack(f"<{pairs}I", expert_bytes), default=0) <= MAX_EXPERT
        valid = valid and all(map(isfinite, struct.unpack(f"<{pairs}f", weight_bytes)))
    else:
        valid = pairs == 0 or (int(experts.max()) <= MAX_EXPERT and bool(np.isfinite(weights).all()))
    if not valid:
        raise WireError("An expert's number is over 65,535 or a weight is not finite.")
    return Routing(offsets, experts, weights)


def write_head(request: pb.ComputeRequest, hidden: torch.Tensor, eight_bit: bool = False) -> bytes:
    """Fills what a request says of `hidden` [tokens, hidden] f32 or bf16 on the CPU; `eight_bit`: rounds it.

    Returns the bytes that belong into hidden_states.
    """
    request.tokens, request.hidden_size = hidden.shape
    if eight_bit:
        request.dtype = pb.DTYPE_INT8
        states, request.scales = _to_int8(hidden)
        return states
    request.dtype = CODES[hidden.dtype]
    return tensor_bytes(hidden)


def write_request(
    request: pb.ComputeRequest, hidden: torch.Tensor, routing: Routing, eight_bit: bool = False
) -> None:
    """Fills a request's tensors: `hidden` [tokens, hidden] f32 or bf16 on the CPU; `eight_bit`: rounds it."""
    request.hidden_states = write_head(request, hidden, eight_bit)
    write_routing(request, routing)


def head_bytes(request: pb.ComputeRequest, nbytes: int) -> bytes:
    """The bytes of a request up to its hidden states, which are `nbytes` long and not in it.

    Then come those, its routing (`routing_bytes`) and its id (`id_piece`), in pieces that belong together. Protobuf
    would copy the hidden states twice, and take longer over a request of one token than over its bytes.
    """
    return request.SerializeToString() + _STATES + varint(nbytes)


def routing_bytes(routing: Routing) -> bytes:
    """A routing as the fields of a request."""
    message = pb.ComputeRequest()
    write_routing(message, routing)
    return message.SerializeToString()


def id_piece(number: int) -> bytes:
    """A request's id, to stand anywhere among its pieces."""
    return _ID + varint(number)


_ID = bytes([pb.ComputeRequest.ID_FIELD_NUMBER << 3])
_STATES = bytes([pb.ComputeRequest.HIDDEN_STATES_FIELD_NUMBER << 3 | 2])


def write_routing(message: pb.ComputeRequest | pb.ChainNode, routing: Routing) -> None:
    """Fills a message's routing."""
    message.offsets = routing.offsets.astype("<u4", copy=False).tobytes()
    message.experts = routing.experts.astype("<u4", copy=False).tobytes()
    message.weights = routing.weights.astype("<f4", copy=False).tobytes()


def write_values(reply: pb.ComputeReply, rows: torch.Tensor, dtype: pb.Dtype) -> None:
    """Fills a reply's rows [rows, hidden], of the request's `dtype`."""
    reply.rows = rows.shape[0]
    if dtype == pb.DTYPE_INT8:
        reply.values, reply.scales = _to_int8(rows)
    else:
        reply.values = tensor_bytes(rows)


def rows_tensor(raw: bytes, dtype: torch.dtype, rows: int, hidden: int) -> torch.Tensor:
    """[rows, hidden] f32 or bf16 out of their bytes, which it shares. Raises WireError for too many or few."""
    return _tensor(raw, dtype, rows, hidden, "values")


def raw_values(reply: pb.ComputeReply, rows: int, hidden: int, dtype: torch.dtype) -> bytes | None:
    """The bytes of a reply's rows, as many as [rows, hidden] of `dtype` has; None where `read_values` must look."""
    raw = reply.values
    return raw if reply.rows == rows and len(raw) == rows * hidden * dtype.itemsize and not reply.scales else None


def read_values(reply: pb.ComputeReply, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """A reply's rows [rows, hidden], of `dtype`, or f32 where they came in 8 bits.

    Raises WireError when it does not answer what was asked.
    """
    if reply.rows != rows:
        raise WireError(f"The reply has {reply.rows} rows where {rows} were asked for.")
    if scales := reply.scales:
        return _from_int8(reply.values, scales, rows, hidden, "values")
    return _tensor(reply.values, dtype, rows, hidden, "values")
