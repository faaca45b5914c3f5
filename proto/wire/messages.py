"""gRPC's messages in a stream's bytes: a byte that says whether it is compressed, four of length, the message."""

import struct
from typing import TypeAlias

import grpc
import grpc.aio
import numpy as np

from . import status

PREFIX_BYTES = 5
_PREFIX = struct.Struct(">BI")
COPIED_BYTES = 64 << 10  # up to here a message is put together of its pieces; a larger one is sent in its pieces

Buffer: TypeAlias = bytes | bytearray | memoryview


def prefix(length: int) -> bytes:
    """The bytes before a message."""
    return _PREFIX.pack(0, length)


class Assembler:
    """Cuts a stream's bytes into messages."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of a message."""
        self.max_bytes = max_bytes
        self._prefix = bytearray()
        self._message: memoryview | None = None  # that is being filled
        self._got = 0

    @property
    def missing(self) -> int:
        """Bytes of the message that has begun."""
        return 0 if self._message is None else len(self._message) - self._got

    @property
    def between(self) -> bool:
        """Whether no message has begun."""
        return self._message is None and not self._prefix

    def room(self) -> memoryview:
        """Where the next bytes of the message that has begun belong; `filled` says how many came."""
        assert self._message is not None
        return self._message[self._got :]

    def filled(self, count: int) -> memoryview | None:
        """`count` bytes are in `room`; returns the message if that was all of it."""
        self._got += count
        message = self._message
        assert message is not None
        if self._got < len(message):
            return None
        self._message = None
        return message

    def feed(self, data: memoryview) -> list[Buffer]:
        """The messages that `data` completes. Raises AioRpcError for one that is too large or compressed."""
        done: list[Buffer] = []
        while data:
            if self._message is None:
                part = data[: PREFIX_BYTES - len(self._prefix)]
                self._prefix += part
                data = data[len(part) :]
                if len(self._prefix) < PREFIX_BYTES:
                    break
                length = self._length(memoryview(self._prefix))
                self._prefix.clear()
                if length == 0:
                    done.append(b"")
                    continue
                # Not a bytearray, which would be filled with zeros first.
                self._message, self._got = np.empty(length, np.uint8).data, 0
            part = data[: self.missing]
            self.room()[: len(part)] = part
            message = self.filled(len(part))
            if message is not None:
                done.append(message)
            data = data[len(part) :]
        return done

    def _length(self, data: memoryview) -> int:
        compressed, length = _PREFIX.unpack_from(data)
        if compressed:
            raise status.error(grpc.StatusCode.UNIMPLEMENTED, "Compressed messages are not taken here.")
        if length > self.max_bytes:
            raise status.error(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"A message of {length} bytes is over the limit of {self.max_bytes}.",
            )
        return int(length)
