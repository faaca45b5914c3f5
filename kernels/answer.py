"""A node's answers to requests of decoding, from the bytes that came to the bytes that go: kernels/cpu/answer.cc.

There is one such request for each layer of each token, and what Python does about one takes longer than a small
expert's arithmetic. Who reads a connection natively calls it without Python (proto/cpp/messages.cc). What is not
plain is not answered here.
"""

import ctypes
from collections.abc import Mapping

import numpy as np

from .geometry import ExpertSpec
from .native import NativeExperts, describe, library
from .ops import ExpertWeights

MAX_REPLY_BYTES = 1 << 20


class Table(ctypes.Structure):
    """MoehiveTable of kernels/cpu/answer.cc, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("spec", "blobs")),
        *((name, ctypes.c_int64) for name in ("count", "work")),
    )


class Answering(ctypes.Structure):
    """MoehiveAnswering of kernels/cpu/answer.cc, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("experts", "tables")),
        ("layers", ctypes.c_int64),
        ("first_epoch", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("most_bytes", "most_pairs", "most_work")),
        ("reply", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("room", "calls", "pairs", "nanoseconds")),
    )

    tables: int
    layers: int
    first_epoch: int  # requests of older ones mean another model
    calls: int  # that were answered, ever
    pairs: int  # of those
    nanoseconds: int  # that they took


class Answerer:
    """Answers plain requests. Not for several threads at once: it has but one place for a reply."""

    def __init__(
        self, native: NativeExperts, most_bytes: int, most_pairs: int, most_work: int, head_bytes: int = 0
    ) -> None:
        """Of at most so many bytes, pairs and multiply-adds; `head_bytes` are free before a reply.

        Raises NativeLibraryError.
        """
        self._native = native
        self._tables = (Table * 0)()
        self._kept: dict[int, tuple[object, ...]] = {}  # what the tables point to, by layer
        self.first_epoch = 0
        self._call = library().moehive_answer
        self._room = ctypes.create_string_buffer(head_bytes + MAX_REPLY_BYTES)
        self.state = Answering(
            experts=native.handle,
            most_bytes=most_bytes,
            most_pairs=most_pairs,
            most_work=most_work,
            reply=ctypes.addressof(self._room) + head_bytes,
            room=MAX_REPLY_BYTES,
        )
        self.function = ctypes.cast(self._call, ctypes.c_void_p).value or 0
        """The address of the native function that takes a message."""
        self.context = ctypes.addressof(self.state)
        """What it is called with."""
        self._reply, self._size = ctypes.c_void_p(), ctypes.c_int64()

    def begin(self, layers: int, first_epoch: int) -> None:
        """Of a model of so many layers from an epoch on; none of them is known yet."""
        self._tables, self._kept = (Table * layers)(), {}
        self.state.tables, self.state.layers = ctypes.addressof(self._tables), layers
        self.state.first_epoch = self.first_epoch = first_epoch

    def use(self, layer: int, spec: ExpertSpec, held: Mapping[int, ExpertWeights], experts: int) -> None:
        """From now on a layer of so many experts is answered from `held`, which must stay as it is and is kept alive.

        Those of `held` in another format than `spec`'s are left out.
        """
        blobs = (ctypes.c_uint64 * experts)()
        for number, weights in held.items():
            if number < experts and weights.spec is spec:
                blobs[number] = weights.address
        described = describe(spec)
        self._tables[layer] = Table(ctypes.addressof(described), ctypes.addressof(blobs), experts, spec.weights)
        self._kept[layer] = described, blobs, held

    def answer(self, message: bytes | bytearray | memoryview, times: int) -> bytes | None:
        """The reply to a message; None when it is not plain, not sound, or of experts that are not there.

        `times`: where the MoehiveTimes of kernels/cpu/answer.cc are that the message came with.
        """
        where = message if type(message) is bytes else np.frombuffer(message, np.uint8).ctypes.data
        reply, size = self._reply, self._size
        if not self._call(self.context, where, len(message), times, ctypes.byref(reply), ctypes.byref(size)):
            return None
        return ctypes.string_at(reply.value or 0, size.value)
