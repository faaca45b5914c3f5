"""Requests of decoding, answered from the bytes that came to the bytes that go by the native library.

They are nearly all requests there are, and the quickest to compute: one token or a few, experts that lie in RAM, rows
as they are. Whatever is different, or wrong, is left to service.py, which says what.
"""

from time import perf_counter_ns

from moehive.kernels.answer import Answerer, LayerTable
from moehive.kernels.ops import FEW_TOKENS

from .executor import Executor


class PlainRequests:
    """Use it on the event loop's thread, where alone the store changes."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        native = executor.ops.native
        self._answerer = None if native is None else Answerer(native)
        self._tables: dict[int, LayerTable] = {}

    def answer(self, message: bytes | bytearray) -> bytes | None:
        """The reply to a message; None for one that is not plain. Raises MemoryError."""
        answerer, store = self._answerer, self._executor.store
        if answerer is None or store.tier is not None or store.gpu is not None:
            return None
        start = perf_counter_ns()
        message = bytes(message)
        request = answerer.request
        if not answerer.read(message):
            return None
        layer, pairs = request.layer, request.pairs
        if pairs > FEW_TOKENS or request.epoch < store.first_epoch or not self._executor.quick(layer, pairs):
            return None
        table = self._tables.get(layer)
        if table is None or table.held is not store.layer(layer):
            table = self._table(layer)
            if table is None:
                return None
        reply = answerer.answer(message, table)
        if reply is not None:
            self._executor.note(pairs, perf_counter_ns() - start)
        return reply

    def _table(self, layer: int) -> LayerTable | None:
        """Where the experts of a layer lie as of now; None for a layer that the model does not have."""
        store = self._executor.store
        if store.manifest is None or layer >= len(store.manifest.layers):
            return None
        geometry = store.manifest.layers[layer]
        table = self._tables[layer] = LayerTable(geometry.spec, store.layer(layer), geometry.experts)
        return table
