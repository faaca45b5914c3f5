"""Requests of decoding, answered from the bytes that came to the bytes that go by the native library.

They are nearly all requests there are, and the quickest to compute: one token or a few, experts that lie in RAM, rows
as they are. Whatever is different, or wrong, is left to service.py, which says what.
"""

import ctypes
from collections.abc import Iterable

from moehive.kernels.answer import Answerer
from moehive.kernels.geometry import Manifest
from moehive.kernels.ops import FEW_TOKENS
from moehive.proto.wire.messages import Buffer
from moehive.proto.wire.windows import HEAD_BYTES, Times

from .executor import LARGE_WORK, Executor

MAX_BYTES = 256 << 10  # of a request


class PlainRequests:
    """Use it on the event loop's thread, where alone the store changes."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._store = executor.store
        native = executor.ops.native
        self._answerer = (
            None if native is None else Answerer(native, MAX_BYTES, FEW_TOKENS, LARGE_WORK, head_bytes=HEAD_BYTES)
        )
        self.function = 0 if self._answerer is None else self._answerer.function
        self.context = 0 if self._answerer is None else self._answerer.context
        self._manifest: Manifest | None = None  # of the model that the answerer knows
        self._seen = 0, 0, 0  # of the answerer's counters

    def ready(self) -> bool:
        """Whether any is answered now; whoever calls the answerer's native function asks before."""
        store = self._store
        if self._answerer is None or store.tier is not None or store.manifest is None:
            return False
        if store.gpu is not None and not store.gpu.idle:
            return False
        if store.changed or store.manifest is not self._manifest or store.first_epoch != self._answerer.first_epoch:
            self._follow(self._answerer, store.manifest)
        return True

    def answered(self) -> int:
        """Notes what was answered since the last call, and says how many requests that was."""
        if self._answerer is None:
            return 0
        state = self._answerer.state
        calls, pairs, nanoseconds = self._seen
        if state.calls == calls:
            return 0
        self._seen = state.calls, state.pairs, state.nanoseconds
        self._executor.note(state.pairs - pairs, state.nanoseconds - nanoseconds, state.calls - calls)
        return state.calls - calls

    def answer(self, message: Buffer, times: Times) -> bytes | None:
        """The reply to a message that came at `times`; None for one that is not plain."""
        if self._answerer is None or not self.ready():
            return None
        reply = self._answerer.answer(message, ctypes.addressof(times))
        self.answered()
        return reply

    def _follow(self, answerer: Answerer, manifest: Manifest) -> None:
        """Tells the answerer where the store's experts lie now."""
        store = self._store
        layers: Iterable[int] = store.changed
        if manifest is not self._manifest or store.first_epoch != answerer.first_epoch:
            self._manifest = manifest
            answerer.begin(len(manifest.layers), store.first_epoch)
            layers = range(len(manifest.layers))
        for layer in layers:
            geometry = manifest.layers[layer]
            answerer.use(layer, geometry.spec, store.layer(layer), geometry.experts)
        store.changed = set()
