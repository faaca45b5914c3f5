"""A node's answer to a request of decoding in two native calls: kernels/cpu/answer.cc reads and writes the bytes.

There is one such request for each layer of each token, and what Python does about one takes longer than a small
expert's arithmetic. What is not plain is not answered here.
"""

import ctypes
from collections.abc import Mapping

from .geometry import ExpertSpec
from .native import NativeExperts, describe, library
from .ops import ExpertWeights

MAX_REPLY_BYTES = 1 << 20


class PlainRequest(ctypes.Structure):
    """MoehiveRequest of kernels/cpu/answer.cc, field for field."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("id", "epoch")),
        *((name, ctypes.c_uint32) for name in ("layer", "tokens", "hidden_size", "dtype", "reduction", "pairs")),
        *((name, ctypes.c_uint32) for name in ("hidden_at", "offsets_at", "experts_at", "weights_at")),
    )

    layer: int
    epoch: int
    tokens: int
    pairs: int


class LayerTable:
    """Where the experts of a layer lie: `held`, which must stay as it is and is kept alive."""

    def __init__(self, spec: ExpertSpec, held: Mapping[int, ExpertWeights], experts: int) -> None:
        """`experts`: how many the layer has; those of `held` in another format than `spec`'s are left out."""
        self.held = held
        addresses = (
            held[number].address if number in held and held[number].spec is spec else 0 for number in range(experts)
        )
        self.blobs = (ctypes.c_uint64 * experts)(*addresses)
        self.spec = describe(spec)
        self.work = spec.weights  # multiply-adds of a pair
        self.arguments = ctypes.addressof(self.spec), ctypes.addressof(self.blobs), experts  # of the native call


class Answerer:
    """Answers plain requests. Not for several threads at once: it has but one place for a reply."""

    def __init__(self, native: NativeExperts) -> None:
        """Raises NativeLibraryError."""
        self.request = PlainRequest()  # what `read` has read
        self._native = native
        self._read = library().moehive_read_request
        self._answer = library().moehive_answer
        self._request = ctypes.addressof(self.request)
        self._reply = ctypes.create_string_buffer(MAX_REPLY_BYTES)
        self._reply_at = ctypes.addressof(self._reply)

    def read(self, message: bytes) -> bool:
        """Reads a message into `request`; whether it is a plain and sound one."""
        return bool(self._read(message, len(message), self._request) == 0)

    def answer(self, message: bytes, table: LayerTable) -> bytes | None:
        """The reply to `message`, which `read` has just read; None if `table` lacks an expert, or it is too large.

        Raises MemoryError.
        """
        size = self._answer(
            self._native.handle, *table.arguments, message, self._request, self._reply_at, MAX_REPLY_BYTES
        )
        if size == -2:
            raise MemoryError("There is no memory left for the experts' intermediate results.")
        return None if size < 0 else ctypes.string_at(self._reply_at, size)
