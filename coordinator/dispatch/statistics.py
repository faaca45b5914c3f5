"""Which experts tokens are sent to: counts that decay, and the latest tokens' experts in all layers.

Private by what it leaves out: expert ids and which tokens belong to one sequence, nothing else. A forward pass is a
task; whoever starts it says which sequences it is of (`passing`), and the dispatcher notes each layer. A pass is
kept once all of its layers were seen, up to `PASS_TOKENS` of its tokens; the oldest are dropped beyond `KEPT_TOKENS`.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from moehive.kernels.geometry import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K

from ..types import CoordinatorError
from ..whole_file import whole_file

KEPT_TOKENS = 20_000  # 60 layers with 10 experts each: 24 MB
PASS_TOKENS = 256  # of one pass: neighbours of a long prompt say little more
HALF_LIFE_TOKENS = 200_000  # after so many tokens a count is worth half
VERSION = 1
NO_EXPERT = 0xFFFF


@dataclass(slots=True, eq=False)
class Pass:
    """One forward pass: of each sequence its key and how many tokens it has here, in the order of the rows."""

    sequences: Sequence[tuple[int, int]]
    rows: npt.NDArray[np.uint16] | None = None  # [layers, tokens, top_k]
    layers: int = 0  # seen so far


passing: ContextVar[Pass | None] = ContextVar("passing", default=None)


class RoutingStatistics:
    """One model's. `note` is called by the dispatcher, on the event loop."""

    def __init__(self, experts: Sequence[int], top_k: int) -> None:
        """`experts` are those of each layer."""
        self._experts = list(experts)
        self._starts = np.concatenate([[0], np.cumsum(self._experts)])[:-1, None, None]
        self._limits = np.array(self._experts)[:, None, None]
        self._top_k = top_k
        self._counts = np.zeros(sum(self._experts))
        self._unit = 1.0  # what a token counts now: growing it is decaying all that was counted before
        self._kept: deque[tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]] = deque()
        self._kept_tokens = 0
        self._numbers: dict[int, tuple[int, bool]] = {}  # sequence's key → its number, and whether it decodes yet
        self._next = itertools.count()
        self.tokens = 0  # noted in all

    def note(self, layer: int, ids: npt.NDArray[np.int64]) -> None:
        """A layer's experts `ids` [tokens, top_k]; ids outside the layer's experts mean none."""
        current = passing.get()
        if current is None:
            return
        if layer == 0:
            current.layers = 0
            current.rows = np.empty((len(self._experts), min(len(ids), PASS_TOKENS), self._top_k), np.uint16)
        rows = current.rows
        if rows is None or layer != current.layers or ids.shape[1] != self._top_k:
            return  # a layer asked for anew, or one of another kind
        # Negative ids and those beyond become large ones: sorted out at the end of the pass.
        rows[layer] = ids[:PASS_TOKENS]
        current.layers += 1
        if current.layers == len(self._experts):
            current.rows = None
            self._keep(rows, current.sequences)

    def same_layers(self, other: "RoutingStatistics") -> bool:
        """Whether both are of one model's layers."""
        return self._experts == other._experts and self._top_k == other._top_k

    def counts(self, layer: int) -> npt.NDArray[np.float64]:
        """Tokens that each expert [experts] was sent, the recent ones counting most."""
        start = int(self._starts[layer, 0, 0])
        return self._counts[start : start + self._experts[layer]] / self._unit

    def trace(self) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
        """`experts` [layers, tokens, top_k] and `seq` [tokens] of what is kept, the oldest first."""
        if not self._kept:
            return np.zeros((len(self._experts), 0, self._top_k), np.uint16), np.zeros(0, np.uint32)
        parts = list(self._kept)
        return np.concatenate([p for p, _ in parts], axis=1), np.concatenate([s for _, s in parts])

    def _keep(self, experts: npt.NDArray[np.uint16], sequences: Sequence[tuple[int, int]]) -> None:
        """A pass whose layers were all seen: `experts` [layers, tokens, top_k]."""
        tokens = experts.shape[1]
        beyond = experts >= self._limits
        flat = experts + self._starts
        if beyond.any():
            experts[beyond] = NO_EXPERT
            flat = flat[~beyond]
        self._unit *= 2.0 ** (tokens / HALF_LIFE_TOKENS)
        np.add.at(self._counts, flat.ravel(), self._unit)
        if self._unit > 1e12:
            self._counts /= self._unit
            self._unit = 1.0
        seq = np.empty(tokens, dtype=np.uint32)
        at = 0
        for key, count in sequences:
            seq[at : at + count] = self._number(key, count)
            at += count
        if at < min(tokens, PASS_TOKENS):
            return  # a pass of other rows than was said
        self.tokens += tokens
        self._kept.append((experts, seq))
        self._kept_tokens += tokens
        while self._kept_tokens > KEPT_TOKENS and len(self._kept) > 1:
            self._kept_tokens -= self._kept.popleft()[0].shape[1]

    def _number(self, key: int, count: int) -> int:
        """A sequence's number. Keys may come again: a prompt after decoding is another sequence's."""
        known = self._numbers.get(key)
        decodes = count == 1
        if known is None or (known[1] and not decodes):
            if len(self._numbers) > 4096:
                self._numbers.clear()
            number = next(self._next) & 0xFFFF_FFFF
        else:
            number = known[0]
        self._numbers[key] = number, decodes
        return number

    def packed(self) -> bytes:
        """What `restore` reads: msgpack, expert ids and sequence numbers only."""
        experts, seq = self.trace()
        packed: bytes = msgpack.packb(
            {
                "version": VERSION,
                "experts_per_layer": self._experts,
                "top_k": self._top_k,
                "tokens": self.tokens,
                "counts": (self._counts / self._unit).astype("<f4").tobytes(),
                "experts": experts.astype("<u2").tobytes(),
                "seq": seq.astype("<u4").tobytes(),
            }
        )
        return packed

    @classmethod
    def restore(cls, packed: bytes) -> "RoutingStatistics":
        """Raises CoordinatorError when it is not what `packed` wrote."""
        try:
            raw: Any = msgpack.unpackb(packed)
            layers, top_k, tokens = raw["experts_per_layer"], raw["top_k"], raw["tokens"]
            if raw["version"] != VERSION or not 1 <= len(layers) <= MAX_LAYERS or not 1 <= top_k <= MAX_TOP_K:
                raise ValueError("it is of another version")
            if not all(type(n) is int and 1 <= n <= MAX_EXPERTS for n in layers) or type(tokens) is not int:
                raise ValueError("it has no such layers")
            found = cls(layers, top_k)
            seq = np.frombuffer(raw["seq"], "<u4").astype(np.uint32)
            experts = np.frombuffer(raw["experts"], "<u2").astype(np.uint16).reshape(len(layers), len(seq), top_k)
            counts = np.frombuffer(raw["counts"], "<f4").astype(np.float64)
            if counts.shape != found._counts.shape or not np.isfinite(counts).all() or len(seq) > 2 * KEPT_TOKENS:
                raise ValueError("its parts do not fit together")
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise CoordinatorError(f"The routing statistics can't be read: {error}.") from error
        found._counts[:] = counts
        found.tokens = tokens
        if len(seq):
            found._kept.append((experts, seq))
            found._kept_tokens = len(seq)
            found._next = itertools.count(int(seq.max()) + 1)
        return found


def save_statistics(packed: bytes, path: Path) -> None:
    """Writes beside, then renames; for its owner only. Raises OSError."""
    with whole_file(path, 0o600) as file:
        file.write(packed)
