"""Requests and replies of the hop as tensors: raw little-endian bytes, every size checked before use; no pickle.

Hidden states and rows are never handed to protobuf, which copies a bytes field four times on its way: they are sent
from the tensor's own memory, and read where the message lies.
"""

import ctypes
import struct
import sys
import warnings
from math import isfinite
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from google.protobuf.message import Message

from . import experts_pb2 as pb
from .fields import find_field
from .rounding import Rounded, round_rows, scale_groups, unround_rows
from .varint import varint
from .wire.messages import COPIED_BYTES, Buffer

MAX_TOKENS = 8192
MAX_HIDDEN = 65_536
MAX_LAYER = 1023
MAX_TENSOR_BYTES = 64 << 20
MAX_PAIRS_PER_TOKEN = 64
MAX_EXPERT = 65_535

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


class Request(NamedTuple):
    """A ComputeRequest that came."""

    head: pb.ComputeRequest  # all but its hidden states
    states: Buffer  # those


class Reply(NamedTuple):
    """A ComputeReply that came."""

    head: pb.ComputeReply  # all but its rows
    values: Buffer  # those


def parse_request(message: Buffer) -> Request:
    """A serialized request. It shares the bytes of a large one, which must stay. Raises DecodeError."""
    return Request(*_parse(pb.ComputeRequest, "hidden_states", pb.ComputeRequest.HIDDEN_STATES_FIELD_NUMBER, message))


def parse_reply(message: Buffer) -> Reply:
    """A serialized reply. It shares the bytes of a large one, which must stay. Raises DecodeError."""
    return Reply(*_parse(pb.ComputeReply, "values", pb.ComputeReply.VALUES_FIELD_NUMBER, message))


_Kind = TypeVar("_Kind", bound=Message)


def _parse(kind: type[_Kind], field: str, number: int, message: Buffer) -> tuple[_Kind, Buffer]:
    """A message without one bytes field, and that. A small one, or a strange one, is protobuf's to take apart."""
    place = find_field(message, number) if len(message) > COPIED_BYTES else None
    if place is None:
        head = kind.FromString(message)  # type: ignore[arg-type]  # any buffer of bytes
        content: bytes = getattr(head, field)
        head.ClearField(field)
        return head, content
    view = memoryview(message)
    return kind.FromString(b"".join((view[: place.start], view[place.end :]))), view[place.content : place.end]


def tensor_buffer(tensor: torch.Tensor) -> Buffer:
    """A CPU tensor's bytes in order. Of a large one they are its own memory, to be left alone until they are used."""
    # Not `contiguous` alone: even where it has nothing to do, torch's way there is long and seldom in a cache.
    flat = tensor if tensor.is_contiguous() else tensor.contiguous()
    if flat.nbytes <= COPIED_BYTES:
        return ctypes.string_at(flat.data_ptr(), flat.nbytes)  # half the cost of a view, an array and its bytes
    return flat.view(-1).view(torch.uint8).numpy().data


# Tensors below are views of a message's bytes, which nobody else holds and which are only read. Torch has no such
# kind of tensor and says so once.
warnings.filterwarnings("ignore", "The given (buffer|NumPy array) is not writable", UserWarning)


def _check_size(nbytes: int, dtype: torch.dtype, rows: int, columns: int, what: str) -> None:
    if rows * columns * dtype.itemsize != nbytes:
        raise WireError(f"{what} has {nbytes} bytes where [{rows}, {columns}] of {dtype} was announced.")


def _tensor(data: Buffer, dtype: torch.dtype, rows: int, columns: int, what: str) -> torch.Tensor:
    _check_size(len(data), dtype, rows, columns, what)
    if not data:  # a reply of no rows
        return torch.empty((rows, columns), dtype=dtype)
    tensor = torch.frombuffer(data, dtype=dtype).view(rows, columns)
    # What we send is aligned where the message is (`_until`); others may send what is not.
    return tensor if tensor.data_ptr() % dtype.itemsize == 0 else tensor.clone()


def _to_int8(rows: torch.Tensor) -> tuple[Buffer, bytes]:
    """Rows [rows, columns] as int8 bytes, and the bytes of their scales (`round_rows`)."""
    steps, scales = round_rows(rows)
    return tensor_buffer(steps), bytes(tensor_buffer(scales))


def _rounded(data: Buffer, scales: bytes, rows: int, columns: int, what: str) -> Rounded:
    """Rows in 8 bits [rows, columns] that came. Raises WireError."""
    _check_size(len(data), torch.int8, rows, columns, what)
    _check_size(len(scales), torch.float32, rows, scale_groups(columns), f"scales of {what}")
    if not np.isfinite(np.frombuffer(scales, "<f4")).all():
        raise WireError(f"A scale of {what} is not finite.")
    return Rounded(data, scales)


def read_request(whole: Request) -> tuple[torch.Tensor, Routing]:
    """Hidden states [tokens, hidden], f32 or bf16, and routing of a request, to be read only. Raises WireError."""
    request = whole.head
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
        rounded = _rounded(whole.states, request.scales, tokens, hidden, "hidden_states")
        states = unround_rows(rounded, tokens, hidden)
    else:
        states = _tensor(whole.states, dtype, tokens, hidden, "hidden_states")
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


def write_head(request: pb.ComputeRequest, hidden: torch.Tensor, eight_bit: bool = False) -> Buffer:
    """Fills what a request says of `hidden` [tokens, hidden] f32 or bf16 on the CPU; `eight_bit`: rounds it.

    Returns what belongs into hidden_states; it may be `hidden`'s own memory (`tensor_buffer`).
    """
    request.tokens, request.hidden_size = hidden.shape
    if eight_bit:
        request.dtype = pb.DTYPE_INT8
        states, request.scales = _to_int8(hidden)
        return states
    request.dtype = CODES[hidden.dtype]
    return tensor_buffer(hidden)


def head_bytes(request: pb.ComputeRequest, nbytes: int) -> bytes:
    """The bytes of a request up to its hidden states, which are `nbytes` long and not in it.

    Then come those, its routing (`routing_bytes`) if it is not in it, and its id (`id_piece`), in pieces that belong
    together. Protobuf would take longer over a request of one token than over its bytes.
    """
    return _until(request, _STATES, nbytes)


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
_VALUES = bytes([pb.ComputeReply.VALUES_FIELD_NUMBER << 3 | 2])
# Of 0, 5, 2 and 3 bytes: an id of 0, which the message's own replaces, in more bytes than it takes.
_FILLERS = (b"", _ID + b"\x80\x80\x80\x00", _ID + b"\x00", _ID + b"\x80\x00")
assert pb.ComputeReply.ID_FIELD_NUMBER == pb.ComputeRequest.ID_FIELD_NUMBER


def _until(message: pb.ComputeRequest | pb.ComputeReply, tag: bytes, nbytes: int) -> bytes:
    """A message's bytes up to those of a field that is not in it: `nbytes`, at a multiple of 4 if they are many."""
    head, coded = message.SerializeToString(), tag + varint(nbytes)
    filler = _FILLERS[-(len(head) + len(coded)) % 4] if nbytes > COPIED_BYTES else b""
    return filler + head + coded


def write_routing(message: pb.ComputeRequest | pb.ChainNode, routing: Routing) -> None:
    """Fills a message's routing."""
    message.offsets = routing.offsets.astype("<u4", copy=False).tobytes()
    message.experts = routing.experts.astype("<u4", copy=False).tobytes()
    message.weights = routing.weights.astype("<f4", copy=False).tobytes()


def reply_pieces(reply: pb.ComputeReply, rows: torch.Tensor, dtype: pb.Dtype) -> tuple[Buffer, ...]:
    """The bytes of a reply with `rows` [rows, hidden], sent as the request's `dtype`, in pieces that belong together.

    `reply` has the other fields. The rows must not change until the pieces have left.
    """
    reply.rows = rows.shape[0]
    if dtype == pb.DTYPE_INT8:
        values, reply.scales = _to_int8(rows)
    else:
        values = tensor_buffer(rows)
    return _until(reply, _VALUES, len(values)), values


def rows_tensor(raw: Buffer, dtype: torch.dtype, rows: int, hidden: int) -> torch.Tensor:
    """[rows, hidden] f32 or bf16 out of their bytes, which it shares. Raises WireError for too many or few."""
    return _tensor(raw, dtype, rows, hidden, "values")


def raw_values(reply: Reply, rows: int, hidden: int, dtype: torch.dtype) -> Buffer | None:
    """The bytes of a reply's rows, as many as [rows, hidden] of `dtype` has; None where `read_values` must look."""
    head, raw = reply
    return raw if head.rows == rows and len(raw) == rows * hidden * dtype.itemsize and not head.scales else None


def rounded_values(reply: Reply, rows: int, hidden: int) -> Rounded | None:
    """A reply's rows [rows, hidden] in 8 bits; None for one that brings them otherwise. Raises as `read_values`."""
    head, raw = reply
    if head.rows != rows:
        raise WireError(f"The reply has {head.rows} rows where {rows} were asked for.")
    return _rounded(raw, head.scales, rows, hidden, "values") if head.scales else None


def read_values(reply: Reply, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """A reply's rows [rows, hidden], of `dtype`, or f32 where they came in 8 bits; only to be read.

    Raises WireError when it does not answer what was asked.
    """
    rounded = rounded_values(reply, rows, hidden)
    if rounded is not None:
        return unround_rows(rounded, rows, hidden)
    return _tensor(reply.values, dtype, rows, hidden, "values")
