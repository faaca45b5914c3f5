"""The hop's tensors: what goes in comes out, and a hostile request is a WireError before anything is allocated."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.proto import experts_pb2 as pb
from moehive.proto import tensors
from moehive.proto.tensors import (
    Reply,
    Request,
    Routing,
    WireError,
    head_bytes,
    id_piece,
    parse_reply,
    parse_request,
    read_request,
    read_values,
    reply_pieces,
    routing_bytes,
    tensor_buffer,
    write_head,
)

fuzz = settings(max_examples=int(os.environ.get("MOEHIVE_FUZZ_EXAMPLES", "200")), deadline=None)


def make(tokens: int, hidden: int, counts: list[int], dtype: torch.dtype = torch.float32) -> pb.ComputeRequest:
    """A valid request; token t has counts[t] experts."""
    generator = torch.Generator().manual_seed(tokens * 1000 + hidden)
    states = torch.randn((tokens, hidden), generator=generator).to(dtype)
    pairs = sum(counts)
    routing = Routing(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        np.arange(pairs, dtype=np.uint32),
        np.linspace(-2, 2, pairs, dtype=np.float32),
    )
    return written(states, routing)


def written(states: torch.Tensor, routing: Routing, eight_bit: bool = False) -> pb.ComputeRequest:
    head = pb.ComputeRequest(layer=3, reduction=pb.REDUCTION_PARTIAL_SUM)
    raw = write_head(head, states, eight_bit)
    return pb.ComputeRequest.FromString(b"".join((head_bytes(head, len(raw)), raw, routing_bytes(routing))))


def read(request: pb.ComputeRequest) -> tuple[torch.Tensor, Routing]:
    return read_request(parse_request(request.SerializeToString()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[2], [0], [1, 0, 64], [3] * 17])
def test_a_request_comes_back_bit_for_bit(counts: list[int], dtype: torch.dtype) -> None:
    request = make(len(counts), 24, counts, dtype)
    states, routing = read(request)
    assert states.shape == (len(counts), 24) and states.dtype == dtype
    assert tensor_buffer(states) == request.hidden_states
    assert np.diff(routing.offsets).tolist() == counts
    assert routing.experts.tolist() == list(range(sum(counts)))
    assert routing.weights.tobytes() == np.linspace(-2, 2, sum(counts), dtype=np.float32).tobytes()


@fuzz
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 1 << 62), st.booleans())
def test_a_request_in_pieces_is_what_protobuf_would_write(counts: list[int], number: int, eight_bit: bool) -> None:
    states, routing = read(make(len(counts), 24, counts))
    head = pb.ComputeRequest(layer=3, reduction=pb.REDUCTION_PARTIAL_SUM)
    raw = write_head(head, states, eight_bit)
    pieces = head_bytes(head, len(raw)), raw, routing_bytes(routing), id_piece(number)
    offsets, experts, weights = (array.tobytes() for array in routing)
    wanted = pb.ComputeRequest(id=number, hidden_states=bytes(raw), offsets=offsets, experts=experts, weights=weights)
    wanted.MergeFrom(head)
    assert pb.ComputeRequest.FromString(b"".join(pieces)) == wanted


LARGE = [(torch.float32, 1 << 16), (torch.bfloat16, 1 << 16), (torch.float32, 3 << 20), (torch.bfloat16, 5 << 20)]


@pytest.mark.parametrize(("dtype", "nbytes"), LARGE)
def test_large_tensors_are_sent_and_read_where_they_lie(dtype: torch.dtype, nbytes: int) -> None:
    columns = 1024
    tokens = nbytes // columns // dtype.itemsize + 1
    states = torch.randn(tokens, columns).to(dtype)
    head = pb.ComputeRequest(layer=3, reduction=pb.REDUCTION_PARTIAL_SUM, epoch=8)
    routing = Routing(np.zeros(tokens + 1, np.uint32), np.empty(0, np.uint32), np.empty(0, np.float32))
    raw = write_head(head, states)
    assert start_of(raw) == states.data_ptr()
    message = bytearray(b"".join((head_bytes(head, len(raw)), raw, routing_bytes(routing), id_piece(7))))
    request = parse_request(message)
    assert request.head.id == 7 and request.head.epoch == 8 and not request.head.hidden_states
    got, _ = read_request(request)
    assert torch.equal(got, states)
    assert start_of(message) < got.data_ptr() < start_of(message) + 64

    pieces = reply_pieces(pb.ComputeReply(id=7), states, tensors.CODES[dtype])
    assert start_of(pieces[1]) == states.data_ptr()
    message = bytearray(b"".join(pieces))
    reply = parse_reply(message)
    assert reply.head.id == 7 and not reply.head.values
    rows = read_values(reply, tokens, columns, dtype)
    assert torch.equal(rows, states)
    assert start_of(message) < rows.data_ptr() < start_of(message) + 64


def start_of(buffer: tensors.Buffer) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def test_what_lies_unaligned_is_read_all_the_same() -> None:
    states = torch.randn(300, 64)
    for before in (b"\x08\x07", b"\x08\x87\x00", b"\x08\x87\x80\x80\x00"):  # an id, in more bytes than it takes
        message = before + b"".join(reply_pieces(pb.ComputeReply(id=7), states, pb.DTYPE_F32))
        assert torch.equal(read_values(parse_reply(message), 300, 64, torch.float32), states)


def test_columns_that_are_not_contiguous_are_sent_in_order() -> None:
    states = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    assert tensor_buffer(states.T) == states.T.contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": 0}, "out of bounds"),
        ({"tokens": tensors.MAX_TOKENS + 1}, "out of bounds"),
        ({"hidden_size": 0}, "out of bounds"),
        ({"hidden_size": tensors.MAX_HIDDEN + 1}, "out of bounds"),
        ({"layer": tensors.MAX_LAYER + 1}, "out of bounds"),
        ({"tokens": tensors.MAX_TOKENS, "hidden_size": tensors.MAX_HIDDEN}, "is over"),
        ({"reduction": 0}, "Unknown reduction"),
        ({"reduction": 99}, "Unknown reduction"),
        ({"dtype": 0}, "Unknown dtype"),
        ({"dtype": 99}, "Unknown dtype"),
        ({"hidden_states": b""}, "hidden_states has 0 bytes"),
        ({"hidden_states": bytes(65)}, "hidden_states has 65 bytes"),
        ({"offsets": b""}, "offsets has 0 bytes"),
        ({"offsets": np.array([1, 1, 3], "<u4").tobytes()}, "must start at 0"),
        ({"offsets": np.array([0, 3, 2], "<u4").tobytes()}, "never decrease"),
        ({"offsets": np.array([0, 1, 2**32 - 1], "<u4").tobytes()}, "at most 64 experts"),
        ({"experts": bytes(8)}, "must have 3 entries"),
        ({"weights": bytes(16)}, "must have 3 entries"),
        ({"experts": np.array([0, 1, 65_536], "<u4").tobytes()}, "over 65,535"),
        ({"weights": np.array([0, np.nan, 1], "<f4").tobytes()}, "not finite"),
        ({"weights": np.array([0, np.inf, 1], "<f4").tobytes()}, "not finite"),
    ],
)
def test_each_bound_has_its_sentence(change: dict[str, Any], sentence: str) -> None:
    request = make(2, 8, [1, 2])
    read(request)
    for name, value in change.items():
        setattr(request, name, value)
    with pytest.raises(WireError, match=sentence):
        read(request)


def test_a_reply_of_one_row_for_each_pair_is_bounded_too() -> None:
    tokens, hidden = 64, 8192  # 2 MiB of hidden states, 64 times that in the reply
    request = make(tokens, hidden, [64] * tokens)
    read(request)
    request.reduction = pb.REDUCTION_PER_EXPERT
    with pytest.raises(WireError, match="The reply"):
        read(request)


u32 = st.integers(0, 2**32 - 1)
small = st.integers(0, 70)
raw = st.binary(max_size=300)
csr = st.lists(small | u32, max_size=12).map(lambda values: np.array(values, "<u4").tobytes())
hostile = st.fixed_dictionaries(
    {},
    optional={
        "layer": small | u32,
        "tokens": st.integers(0, 4) | u32,
        "hidden_size": small | u32,
        "dtype": st.integers(-1, 5) | st.integers(-(2**31), 2**31 - 1),
        "reduction": st.integers(-1, 5) | st.integers(-(2**31), 2**31 - 1),
        "hidden_states": raw,
        "offsets": raw | csr,
        "experts": raw | csr,
        "weights": raw | csr,
    },
)


def read_with_accounts(request: pb.ComputeRequest) -> None:
    """Reads it; only WireError may come, and nothing of the message's announced size may be allocated."""
    real = torch.empty
    allocated: list[int] = []

    def counted(size: tuple[int, int], *, dtype: torch.dtype) -> torch.Tensor:
        allocated.append(size[0] * size[1] * dtype.itemsize)
        return real(size, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        try:
            states, routing = read_request(Request(request, request.hidden_states))
        except WireError as error:
            assert len(str(error)) < 300
            assert allocated == []
            return
    assert allocated == []
    assert states.shape == (request.tokens, request.hidden_size)
    assert len(routing.experts) == len(routing.weights) == routing.offsets[-1]


@fuzz
@given(hostile)
def test_fields_out_of_nowhere(fields: dict[str, Any]) -> None:
    read_with_accounts(pb.ComputeRequest(**fields))


@fuzz
@given(hostile, st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_a_valid_request_with_some_fields_changed(fields: dict[str, Any], counts: list[int]) -> None:
    request = make(len(counts), 4, counts)
    for name, value in fields.items():
        setattr(request, name, value)
    read_with_accounts(request)


@fuzz
@given(st.data(), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_bytes_cut_off_or_flipped(data: st.DataObject, counts: list[int]) -> None:
    message = bytearray(make(len(counts), 4, counts).SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    del message[data.draw(st.integers(0, len(message))) :]
    try:
        request = pb.ComputeRequest.FromString(bytes(message))
    except DecodeError:
        return
    read_with_accounts(request)


@fuzz
@given(u32, raw, st.integers(0, 8), st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_reply_that_does_not_answer(said: int, values: bytes, rows: int, hidden: int, dtype: torch.dtype) -> None:
    reply = Reply(pb.ComputeReply(rows=said), values)
    if said == rows and len(values) == rows * hidden * dtype.itemsize:
        assert read_values(reply, rows, hidden, dtype).shape == (rows, hidden)
    else:
        with pytest.raises(WireError):
            read_values(reply, rows, hidden, dtype)


def test_a_reply_comes_back() -> None:
    values = torch.randn(3, 5)
    reply = parse_reply(b"".join(reply_pieces(pb.ComputeReply(), values, pb.DTYPE_F32)))
    assert torch.equal(read_values(reply, 3, 5, torch.float32), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_rows_come_back_within_half_a_step(dtype: torch.dtype) -> None:
    states = torch.randn(5, 150, generator=torch.Generator().manual_seed(1)).to(dtype) * torch.tensor(
        [[0], [1e-30], [1], [1e3], [1e30]]
    )
    states = states.to(dtype)
    routing = Routing(np.zeros(6, np.uint32), np.empty(0, np.uint32), np.empty(0, np.float32))
    request = written(states, routing, eight_bit=True)
    assert len(request.hidden_states) == states.numel()
    back, _ = read(request)
    reply = parse_reply(b"".join(reply_pieces(pb.ComputeReply(), states, pb.DTYPE_INT8)))
    for got in (back, read_values(reply, 5, 150, dtype)):
        assert got.dtype == torch.float32
        groups = states.float().abs().split(64, 1)  # each with a scale of its own, the last one shorter
        step = torch.cat([group.amax(1, keepdim=True).expand_as(group) / 127 for group in groups], 1)
        assert ((got - states.float()).abs() <= step * 0.501).all()


def test_hostile_8_bit_rows_are_refused() -> None:
    _, routing = read(make(2, 8, [1, 1]))
    with pytest.raises(WireError, match="not finite"):
        read(written(torch.tensor([[torch.inf] * 8, [1.0] * 8]), routing, eight_bit=True))
    request = written(torch.ones(2, 8), routing, eight_bit=True)
    request.reduction = pb.REDUCTION_PER_EXPERT
    with pytest.raises(WireError, match="PER_EXPERT"):
        read(request)
    request.reduction = pb.REDUCTION_PARTIAL_SUM
    request.scales = request.scales[:-1]
    with pytest.raises(WireError, match="scales of hidden_states has 7 bytes"):
        read(request)
    with pytest.raises(WireError, match="scales of values"):
        read_values(Reply(pb.ComputeReply(rows=1, scales=bytes(5)), bytes(8)), 1, 8, torch.float32)
