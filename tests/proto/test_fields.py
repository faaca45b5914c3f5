"""A field that is cut out of a message is what protobuf would have read, and so is all the rest; whatever comes."""

import os

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moehive.proto import experts_pb2 as pb
from moehive.proto import tensors
from moehive.proto.fields import find_field
from moehive.proto.tensors import parse_reply, parse_request

fuzz = settings(max_examples=int(os.environ.get("MOEHIVE_FUZZ_EXAMPLES", "400")), deadline=None)
VALUES = pb.ComputeReply.VALUES_FIELD_NUMBER


def varint(number: int, more: int = 0) -> bytes:
    """As protobuf's, in so many bytes more than it takes."""
    digits = max(1, -(-number.bit_length() // 7)) + more
    return bytes((number >> 7 * k & 127) | (128 if k < digits - 1 else 0) for k in range(digits))


@st.composite
def fields(draw: st.DrawFn) -> bytes:
    """One field, known or not, sound or not."""
    number = draw(st.sampled_from([VALUES, VALUES, 9, 1, 2, 3, 5, 6, 8, 15]) | st.integers(0, 1 << 30))
    kind = draw(st.sampled_from([2, 2, 2, 0, 0, 1, 5, 3, 4, 6, 7]))
    more = draw(st.sampled_from([0] * 6 + list(range(1, 9))))
    tag = varint(number << 3 | kind, more)
    if kind == 0:
        return tag + varint(draw(st.integers(0, (1 << 70) - 1)), draw(st.integers(0, 2)))
    if kind == 2:
        content = draw(st.binary(max_size=20))
        length = len(content) + draw(st.sampled_from([0] * 10 + [1, 200, 1 << 31, 1 << 34]))
        return tag + varint(length, draw(st.sampled_from([0] * 6 + list(range(1, 9))))) + content
    return tag + draw(st.binary(min_size=8, max_size=8) if kind == 1 else st.binary(min_size=4, max_size=4))


messages = st.lists(fields(), max_size=6).map(b"".join) | st.binary(max_size=60)


@fuzz
@given(messages, st.integers(0, 60))
@example(b"\x22\x01a\x22\x00", 0)  # the last one counts, empty as it is
@example(b"\x22\x01a\x22\x01b", 0)
@example(b"\xa2\x80\x80\x80\x10\x01a", 0)  # a tag of more than 32 bits
@example(b"\x22\x03ab", 0)
@example(b"\x2b\x22\x01a\x2c", 0)  # inside a group of an unknown number
def test_whatever_comes_is_read_as_protobuf_reads_it(message: bytes, cut: int) -> None:
    message = message[: len(message) - cut] if cut < len(message) // 2 else message
    for kind, parse, field in (
        (pb.ComputeReply, parse_reply, "values"),
        (pb.ComputeRequest, parse_request, "hidden_states"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors, "COPIED_BYTES", -1)  # small messages are looked at, too
            try:
                wanted = kind.FromString(message)
            except DecodeError:
                with pytest.raises(DecodeError):
                    parse(bytearray(message))
                continue
            head, content = parse(bytearray(message))
        assert bytes(content) == getattr(wanted, field)
        assert not getattr(head, field)
        setattr(head, field, bytes(content))
        assert head == wanted


@fuzz
@given(st.permutations(range(6)), st.binary(max_size=300), st.integers(0, 1 << 64 - 1))
def test_a_sound_message_is_cut_in_any_order_of_its_fields(order: list[int], content: bytes, number: int) -> None:
    parts = [
        pb.ComputeReply(id=number).SerializeToString(),
        b"\x22" + varint(len(content)) + content,
        pb.ComputeReply(refusal=pb.Refusal(sentence="no")).SerializeToString(),
        pb.ComputeReply(chain_ns=[number, 7]).SerializeToString(),
        pb.ComputeReply(scales=content).SerializeToString(),
        b"\x7d" + bytes(4),  # field 15, of a later version
    ]
    message = b"".join(parts[place] for place in order)
    place = find_field(message, VALUES)
    assert place is not None and message[place.content : place.end] == content
    start = sum(len(parts[place]) for place in order[: order.index(1)])
    assert (place.start, place.end) == (start, start + len(parts[1]))


def test_a_message_of_many_fields_is_left_to_protobuf() -> None:
    assert find_field(b"\x08\x01" * 31 + b"\x22\x01a", VALUES) is None
    assert find_field(b"\x08\x01" * 30 + b"\x22\x01a", VALUES) == (60, 62, 63)
    assert find_field(b"\x08\x01", VALUES) == (2, 2, 2)
