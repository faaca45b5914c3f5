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
    Routing,
    WireError,
    head_bytes,
    id_piece,
    read_request,
    read_values,
    routing_bytes,
    tensor_bytes,
    write_head,
    write_request,
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
    request = pb.ComputeRequest(layer=3, reduction=pb.REDUCTION_PARTIAL_SUM)
    write_request(request, states, routing)
    return request


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[2], [0], [1, 0, 64], [3] * 17])
def test_a_request_comes_back_bit_for_bit(counts: list[int], dtype: torch.dtype) -> None:
    request = make(len(counts), 24, counts, dtype)
    states, routing = read_request(pb.ComputeRequest.FromString(request.SerializeToString()))
    assert states.shape == (len(counts), 24) and states.dtype == dtype
    assert tensor_bytes(states) == request.hidden_states
    assert np.diff(routing.offsets).tolist() == counts
    assert routing.experts.tolist() == list(range(sum(counts)))
    assert routing.weights.tobytes() == np.linspace(-2, 2, sum(counts), dtype=np.float32).tobytes()


@fuzz
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 1 << 62), st.booleans())
def test_a_request_in_pieces_is_the_same(counts: list[int], number: int, eight_bit: bool) -> None:
    request = make(len(counts), 24, counts)
    states, routing = read_request(request)
    write_request(request, states, routing, eight_bit)
    head = pb.ComputeRequest(layer=3, reduction=pb.REDUCTION_PARTIAL_SUM)
    raw = write_head(head, states, eight_bit)
    pieces = head_bytes(head, len(raw)), raw, routing_bytes(routing), id_piece(number)
    request.id = number
    assert pb.ComputeRequest.FromString(b"".join(pieces)) == request


def test_columns_that_are_not_contiguous_are_sent_in_order() -> None:
    states = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    assert tensor_bytes(states.T) == states.T.contiguous().numpy().tobytes()


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
    read_request(request)
    for name, value in change.items():
        setattr(request, name, value)
    with pytest.raises(WireError, match=sentence):
        read_request(request)


def test_a_reply_of_one_row_for_each_pair_is_bounded_too() -> None:
    tokens, hidden = 64, 8192  # 2 MiB of hidden states, 64 times that in the reply
    request = make(tokens, hidden, [64] * tokens)
    read_request(request)
    request.reduction = pb.REDUCTION_PER_EXPERT
    with pytest.raises(WireError, match="The reply"):
        read_request(request)


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
            states, routing = read_request(request)
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
    reply = pb.ComputeReply(rows=said, values=values)
    if said == rows and len(values) == rows * hidden * dtype.itemsize:
        assert read_values(reply, rows, hidden, dtype).shape == (rows, hidden)
    else:
        with pytest.raises(WireError):
            read_values(reply, rows, hidden, dtype)


def test_a_reply_comes_back() -> None:
    values = torch.randn(3, 5)
    reply = pb.ComputeReply(rows=3, values=tensor_bytes(values))
    assert torch.equal(read_values(reply, 3, 5, torch.float32), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_rows_come_back_within_half_a_step(dtype: torch.dtype) -> None:
    states = torch.randn(5, 150, generator=torch.Generator().manual_seed(1)).to(dtype) * torch.tensor(
        [[0], [1e-30], [1], [1e3], [1e30]]
    )
    states = states.to(dtype)
    routing = Routing(np.zeros(6, np.uint32), np.empty(0, np.uint32), np.empty(0, np.float32))
    request = pb.ComputeRequest(reduction=pb.REDUCTION_PARTIAL_SUM)
    write_request(request, states, routing, eight_bit=True)
    assert len(request.hidden_states) == states.numel()
    back, _ = read_request(pb.ComputeRequest.FromString(request.SerializeToString()))
    reply = pb.ComputeReply()
    tensors.write_values(reply, states, pb.DTYPE_INT8)
    for got in (back, read_values(reply, 5, 150, dtype)):
        assert got.dtype == torch.float32
        groups = states.float().abs().split(64, 1)  # each with a scale of its own, the last one shorter
        step = torch.cat([group.amax(1, keepdim=True).expand_as(group) / 127 for group in groups], 1)
        assert ((got - states.float()).abs() <= step * 0.501).all()


def test_hostile_8_bit_rows_are_refused() -> None:
    request = make(2, 8, [1, 1])
    write_request(request, torch.tensor([[torch.inf] * 8, [1.0] * 8]), read_request(request)[1], eight_bit=True)
    with pytest.raises(WireError, match="not finite"):
        read_request(request)
    write_request(request, torch.ones(2, 8), Routing(*read_request(make(2, 8, [1, 1]))[1]), eight_bit=True)
    request.reduction = pb.REDUCTION_PER_EXPERT
    with pytest.raises(WireError, match="PER_EXPERT"):
        read_request(request)
    request.reduction = pb.REDUCTION_PARTIAL_SUM
    request.scales = request.scales[:-1]
    with pytest.raises(WireError, match="scales of hidden_states has 7 bytes"):
        read_request(request)
    with pytest.raises(WireError, match="scales of values"):
        read_values(pb.ComputeReply(rows=1, values=bytes(8), scales=bytes(5)), 1, 8, torch.float32)
