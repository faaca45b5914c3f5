"""One bytes field of a message, found where it lies: protobuf would copy it to parse it, and again to hand it out.

Protobuf's wire format is a sequence of fields in any order, each behind a tag that says its number and how long it is
(https://protobuf.dev/programming-guides/encoding/). Whatever is not as usual is left to protobuf itself.
"""

from typing import NamedTuple

from .wire.messages import Buffer

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types
_MOST_FIELDS = 32  # of a message: a request for a whole chain of nodes has 29
_MOST_DIGITS = 5  # bytes of a tag or a length


class Place(NamedTuple):
    """Where a field lies in its message: all three are the message's end when it has none of it."""

    start: int  # of its tag
    content: int
    end: int


class _UnusualError(Exception):
    """Bytes that are no message, or none of ours."""


def find_field(message: Buffer, number: int) -> Place | None:
    """Where a message has the bytes field of that number.

    None for a message that has it twice, has more than 32 fields, or is not valid: such a one is protobuf's to judge.
    What the field's neighbours hold is not looked at.
    """
    wanted, size = number << 3 | _LENGTH, len(message)
    at, found = 0, None
    try:
        for _ in range(_MOST_FIELDS):
            if at == size:
                return found or Place(size, size, size)
            start = at
            tag, at = _read_varint(message, at, _MOST_DIGITS)
            kind = tag & 7
            content = at
            if kind == _VARINT:
                _, at = _read_varint(message, at, 10)
            elif kind == _LENGTH:
                length, content = _read_varint(message, at, _MOST_DIGITS)
                at = content + length
            elif kind in (_FIXED32, _FIXED64):
                at += 4 if kind == _FIXED32 else 8
            else:
                return None
            if at > size or tag >> 32 or (tag == wanted and found is not None):
                return None
            if tag == wanted:
                found = Place(start, content, at)
    except (IndexError, _UnusualError):
        pass
    return None


def _read_varint(message: Buffer, at: int, digits: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends.

    Raises _UnusualError for one of more than so many bytes, IndexError at the message's end.
    """
    number = 0
    for place in range(digits):
        byte = message[at + place]
        number |= (byte & 127) << (7 * place)
        if byte < 128:
            return number, at + place + 1
    raise _UnusualError
