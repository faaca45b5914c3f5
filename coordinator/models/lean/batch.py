"""One forward pass: the tokens of its sequences in a row, and what every layer needs to know of them."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moehive.kernels.linear import LinearOps
from moehive.kernels.trunk_ops import TrunkOps, sequences

from ..base import SequenceInput
from .cache import SequenceCache
from .rope import Rope


@dataclass(frozen=True, slots=True)
class Ops:
    """The arithmetic of this machine."""

    linear: LinearOps
    trunk: TrunkOps


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence's tokens in the batch: rows `first` to `first + tokens`, positions from `start`."""

    cache: SequenceCache
    first: int
    tokens: int
    start: int


class Batch:
    """The tokens of some sequences, [T] in all, one sequence after the other."""

    def __init__(self, inputs: Sequence[SequenceInput], rope: Rope, ops: Ops) -> None:
        """Makes room for the tokens in the sequences' caches."""
        self.spans: list[Span] = []
        first = 0
        for one in inputs:
            cache: SequenceCache = one.cache
            count = len(one.tokens)
            self.spans.append(Span(cache, first, count, cache.tokens))
            for table in cache.tables:
                table.extend(cache.tokens + count)
            first += count
        self.tokens = first
        self._rooms: dict[str, torch.Tensor] = {}
        self.ids = inputs[0].tokens if len(inputs) == 1 else torch.cat([one.tokens for one in inputs])
        self.tables = [
            sequences([(s.first, s.tokens, s.start, s.cache.tables[group].address) for s in self.spans])
            for group in range(len(self.spans[0].cache.tables))
        ]  # for each group of layers, as the native operations take them
        # The same for operations that need no pages.
        self.sequences = sequences([(s.first, s.tokens, s.start, 0) for s in self.spans])
        states = [ctypes.addressof(s.cache.addresses) for s in self.spans]
        self.states = (ctypes.c_void_p * len(states))(*states)  # of each sequence where its states' addresses are
        self.cos, self.sin = ops.trunk.rope(self.sequences, rope.inverse, rope.scaling)
        # Of each sequence how many tokens' logits are wanted, its last ones, and which rows these are of all.
        self.counts = [s.tokens if one.all_logits else 1 for one, s in zip(inputs, self.spans, strict=True)]
        ends = [s.first + s.tokens for s in self.spans]
        self.wanted = torch.tensor(
            [row for end, count in zip(ends, self.counts, strict=True) for row in range(end - count, end)]
        )

    def room(self, name: str, columns: int) -> torch.Tensor:
        """f32 [T, columns], memory for what only one layer's attention needs: the next layer's is given the same.

        Tens of MB that each layer took anew, the system would clear page by page: a tenth of a prompt's time.
        """
        kept = self._rooms.get(name)
        if kept is None or kept.numel() < self.tokens * columns:
            kept = self._rooms[name] = torch.empty(self.tokens * columns)
        return kept[: self.tokens * columns].view(self.tokens, columns)

    def finish(self) -> None:
        """The sequences' caches now hold these tokens."""
        for span in self.spans:
            span.cache.tokens = span.start + span.tokens
            for table in span.cache.tables:
                table.drop_behind(span.cache.tokens)
