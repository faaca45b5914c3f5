"""A call's end: gRPC's status in headers, and as the error that a caller gets."""

from collections.abc import Iterable
from typing import TypeAlias
from urllib.parse import quote, unquote

import grpc
import grpc.aio

from .frames import ErrorCode

Fields: TypeAlias = list[tuple[str, str]]

ANSWER: Fields = [(":status", "200"), ("content-type", "application/grpc")]  # before the messages of an answer
MAX_DETAILS = 1024  # characters; they travel in a header, whose size is bounded

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_RESETS: dict[int, grpc.StatusCode] = {
    ErrorCode.NO_ERROR: grpc.StatusCode.CANCELLED,
    ErrorCode.CANCEL: grpc.StatusCode.CANCELLED,
    ErrorCode.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    """What a caller gets, as from gRPC's own library."""
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing, details=details)


def of_reset(code: int) -> grpc.aio.AioRpcError:
    """The error of a stream that the other side ended with RST_STREAM."""
    kind = _RESETS.get(code, grpc.StatusCode.INTERNAL)
    return error(kind, f"The other side ended the call (HTTP/2 error {code}).")


def trailers(code: grpc.StatusCode, details: str) -> Fields:
    """The headers that end a call."""
    value: int = code.value[0]
    words = [("grpc-status", str(value))]
    if details:
        words.append(("grpc-message", quote(details[:MAX_DETAILS], safe=" !\"#$&'()*+,/:;<=>?@[]^`{|}")))
    return words


def of_headers(fields: Iterable[tuple[str, str]]) -> grpc.aio.AioRpcError | None:
    """What headers that end a call say: an error, or None when all is well."""
    values = dict(fields)
    status = values.get("grpc-status", "")
    if status == "0":
        return None
    details = unquote(values.get("grpc-message", ""))[:MAX_DETAILS]
    if not status.isascii() or not status.isdigit():
        http = values.get(":status", "no status")
        return error(grpc.StatusCode.UNKNOWN, f"The other side speaks HTTP but no gRPC ({http[:16]}).")
    return error(_CODES.get(int(status[:4]), grpc.StatusCode.UNKNOWN), details)
