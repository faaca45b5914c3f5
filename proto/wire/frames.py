"""HTTP/2's frames (RFC 9113, section 4 and 6): as much as gRPC needs."""

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # a client's first bytes
HEADER_BYTES = 9
LEAST_FRAME = 16 << 10  # what everybody takes, until settings say more
LARGEST_FRAME = (16 << 20) - 1  # of data, that we take
LARGEST_CONTROL_FRAME = 32 << 10
LARGEST_WINDOW = (1 << 31) - 1
FIRST_WINDOW = 65_535


# Types, flags and settings are plain numbers: every message is compared with some of them, and Python's enumerations
# take a microsecond for it.

# Types of frames, section 6.
DATA = 0
HEADERS = 1
RST_STREAM = 3
SETTINGS = 4
PUSH_PROMISE = 5
PING = 6
GOAWAY = 7
WINDOW_UPDATE = 8
CONTINUATION = 9

# Flags.
END_STREAM = 0x1
ACK = 0x1  # of SETTINGS and PING
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY = 0x20

# Settings, section 6.5.2.
HEADER_TABLE_SIZE = 1
ENABLE_PUSH = 2
INITIAL_WINDOW_SIZE = 4
MAX_FRAME_SIZE = 5
MAX_HEADER_LIST_SIZE = 6


class ErrorCode(IntEnum):
    """Section 7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class FrameError(Exception):
    """The other side broke the protocol; ends the connection with `code`."""

    def __init__(self, code: ErrorCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def header(length: int, kind: int, flags: int, stream: int) -> bytes:
    """The nine bytes before a payload of `length`."""
    return struct.pack(">HBBBI", length >> 8, length & 0xFF, kind, flags, stream)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return header(len(payload), kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    payload = b"".join(struct.pack(">HI", key, value) for key, value in values.items())
    return frame(SETTINGS, 0, 0, payload)


def window_update(stream: int, credit: int) -> bytes:
    """A WINDOW_UPDATE frame, `credit` from 1 to LARGEST_WINDOW."""
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", credit))


def reset(stream: int, code: ErrorCode) -> bytes:
    """A RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def go_away(last_stream: int, code: ErrorCode, why: str = "") -> bytes:
    """A GOAWAY frame."""
    return frame(GOAWAY, 0, 0, struct.pack(">II", last_stream, code) + why.encode()[:128])


def headers(stream: int, block: bytes, largest: int, *, end: bool) -> bytes:
    """A header block in one HEADERS frame and as many CONTINUATIONs as the other side's `largest` frame asks for."""
    pieces = [block[at : at + largest] for at in range(0, len(block), largest)] or [b""]
    out = b""
    for number, piece in enumerate(pieces):
        flags = END_HEADERS if number == len(pieces) - 1 else 0
        if number == 0 and end:
            flags |= END_STREAM
        out += frame(HEADERS if number == 0 else CONTINUATION, flags, stream, piece)
    return out


def number(payload: memoryview) -> int:
    """What a frame says whose payload is a number. Raises FrameError."""
    if len(payload) != 4:
        raise FrameError(ErrorCode.FRAME_SIZE_ERROR, "A frame is too short or too long.")
    return int.from_bytes(payload, "big")


def unpadded(payload: memoryview, flags: int, *, priority: bool) -> memoryview:
    """A HEADERS or DATA frame's content without padding and the old priority fields. Raises FrameError."""
    start, end = 0, len(payload)
    if flags & PADDED:
        if end < 1:
            raise FrameError(ErrorCode.FRAME_SIZE_ERROR, "A padded frame has no padding.")
        start, end = 1, end - payload[0]
    if priority and flags & PRIORITY:
        start += 5
    if start > end:
        raise FrameError(ErrorCode.PROTOCOL_ERROR, "A frame is padded with more than it has.")
    return payload[start:end]
