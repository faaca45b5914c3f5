"""Requests of decoding, answered from the bytes that came to the bytes that go by the native library.

They are nearly all requests there are, and the quickest to compute: one token or a few, experts that lie in RAM, rows
as they are. Whatever is different, or wrong, is left to service.py, which says what.
"""

from time import perf_counter_ns

from moehive.kernels.answer import Answerer, LayerTable
from moehive.kernels.ops import FEW_TOKENS
from moehive.proto.wire.messages import Buffer

from .executor import LARGE_WORK, Executor


class PlainRequests:
    """Use it on the event loop's thread, where alone the store changes."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._store = executor.store
        native = executor.ops.native
        self._answerer = None if native is None else Answerer(native)
        self._tables: dict[int, LayerTable] = {}

    def answer(self, message: Buffer) -> bytes | None:
        """The reply to a message; None for one that is not plain. Raises MemoryError."""
        answerer, store = self._answerer, self._store
        if answerer is None or store.tier is not None or store.gpu is not None:
            return None
        start = perf_counter_ns()
        if type(message) is not bytes:
            message = bytes(message)
        if not answerer.read(message):
            return None
        request = answerer.request
        layer, pairs = request.layer, request.pairs
        table = self._tables.get(layer)
        if table is None or table.held is not store.layer(layer):
            table = self._table(layer)
            if table is None:
                return None
        if pairs > FEW_TOKENS or pairs * table.work > LARGE_WORK or request.epoch < store.first_epoch:
            return None
        reply = answerer.answer(message, table)
        if reply is not None:
            self._executor.note(pairs, perf_counter_ns() - start)
        return reply

    def _table(self, layer: int) -> LayerTable | None:
        """Where the experts of a layer lie as of now; None for a layer that the model does not have."""
        store = self._store
        if store.manifest is None or layer >= len(store.manifest.layers):
            return None
        geometry = store.manifest.layers[layer]
        table = self._tables[layer] = LayerTable(geometry.spec, store.layer(layer), geometry.experts)
        return table
