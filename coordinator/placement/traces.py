"""Routing traces: which experts each token was sent to, and the batches that are made of them.

The file (`.npz`) has `experts` uint16 [layers, tokens, top_k] and `seq` uint32 [tokens], the sequence of each token.
It holds no text. A batch of n in decoding is n tokens of unrelated sequences; a prefill chunk is n tokens in a row.
"""

import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..types import CoordinatorError
from ..whole_file import whole_file

HELD_BACK = 0.25  # of the sequences, the latest ones: a plan is scored on what it was not made from
MAX_TRACE_BYTES = 4 << 30
NO_EXPERT = 0xFFFF  # a token that was sent to fewer experts
T = TypeVar("T")


class Each(Protocol):
    """Maps a function over layers, perhaps in threads."""

    def __call__(self, work: Callable[[int], T], indices: Sequence[int]) -> list[T]: ...


def one_by_one(work: Callable[[int], T], indices: Sequence[int]) -> list[T]:
    """An `Each` without threads."""
    return [work(index) for index in indices]


def in_pool(pool: Executor) -> Each:
    """An `Each` with the threads of a pool."""

    def each(work: Callable[[int], T], indices: Sequence[int]) -> list[T]:
        return list(pool.map(work, indices))

    return each


class Mix(NamedTuple):
    """One kind of batch that the cluster serves."""

    tokens: int
    prefill: bool = False

    def __str__(self) -> str:
        return f"p{self.tokens}" if self.prefill else str(self.tokens)


DEFAULT_MIXES = (Mix(1), Mix(4), Mix(16))


def parse_mixes(text: str) -> tuple[Mix, ...]:
    """`1,4,16,p256`: decode batches, and prefill chunks with a p. Raises CoordinatorError."""
    mixes = []
    for part in text.replace(" ", "").split(","):
        digits = part.removeprefix("p")
        if not digits.isdecimal() or not 1 <= int(digits) <= 4096:
            raise CoordinatorError(f"{part[:20]!r} is not a batch; write for example 1,4,16 or 1,4,p256.")
        mixes.append(Mix(int(digits), part.startswith("p")))
    if len(set(mixes)) != len(mixes):
        raise CoordinatorError(f"{text[:40]!r} names a batch twice.")
    return tuple(mixes)


@dataclass(frozen=True, slots=True)
class Trace:
    """Tokens of some sequences; a sequence's tokens are in their order."""

    experts: npt.NDArray[np.uint16]  # [layers, tokens, top_k]; NO_EXPERT: none
    seq: npt.NDArray[np.uint32]  # [tokens]

    def __post_init__(self) -> None:
        """Raises CoordinatorError."""
        if self.experts.ndim != 3 or self.seq.ndim != 1 or self.experts.shape[1] != len(self.seq):
            raise CoordinatorError("A trace has experts [layers, tokens, top_k] and seq [tokens].")
        if self.experts.dtype != np.uint16 or self.seq.dtype != np.uint32:
            raise CoordinatorError("A trace's experts are uint16 and its seq uint32.")
        if not all(self.experts.shape):
            raise CoordinatorError("The trace is empty.")
        if (self.experts == NO_EXPERT).all():
            raise CoordinatorError("No token of the trace was sent to any expert.")

    @property
    def layers(self) -> int:
        return len(self.experts)

    @property
    def tokens(self) -> int:
        return len(self.seq)

    def split(self) -> tuple["Trace", "Trace"]:
        """What a plan is made from, and what it is scored on: earlier and later sequences, by their first token."""
        _, first = np.unique(self.seq, return_index=True)
        starts = np.sort(first)
        if len(starts) < 2:  # one sequence: its end is held back
            cut = max(1, int(len(self.seq) * (1 - HELD_BACK)))
            early = np.arange(len(self.seq)) < cut
        else:
            kept = min(len(starts) - 1, max(1, int(len(starts) * (1 - HELD_BACK))))
            ordered = self.seq[starts]
            early = np.isin(self.seq, ordered[:kept])
        if early.all():
            return self, self
        return self.where(early), self.where(~early)

    def where(self, chosen: npt.NDArray[np.bool_]) -> "Trace":
        """The tokens that `chosen` [tokens] marks."""
        return Trace(np.ascontiguousarray(self.experts[:, chosen]), self.seq[chosen])


class Batches(NamedTuple):
    """Batches of one layer, shuffled, so that any part of them is a fair sample."""

    offsets: npt.NDArray[np.int64]  # [batches + 1] into hits
    hits: npt.NDArray[np.uint16]  # distinct experts of each batch, ascending
    mix: npt.NDArray[np.int32]  # [batches]: which kind of batch


def sample(
    trace: Trace, mixes: Sequence[Mix], counts: Sequence[int], seed: int, each: Each = one_by_one
) -> list[Batches]:
    """For each layer, `counts` batches of each of `mixes`, drawn with `seed`."""
    random = np.random.default_rng(seed)
    rows = [
        _runs(trace, mix.tokens, count, random) if mix.prefill else _unrelated(trace, mix.tokens, count, random)
        for mix, count in zip(mixes, counts, strict=True)
    ]
    order = random.permutation(sum(map(len, rows)))
    mix_of = np.repeat(np.arange(len(mixes), dtype=np.int32), [len(part) for part in rows])[order]
    return each(lambda index: _layer(trace.experts[index], rows, order, mix_of), range(trace.layers))


def _layer(
    experts: npt.NDArray[np.uint16],
    rows: Sequence[npt.NDArray[np.int64]],
    order: npt.NDArray[np.int64],
    mix_of: npt.NDArray[np.int32],
) -> Batches:
    """The distinct experts [tokens, top_k] of each batch (a row of token numbers)."""
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    keys, base = [], 0
    for part in rows:
        batch = np.repeat(rank[base : base + len(part)], part.shape[1] * experts.shape[1])
        keys.append(batch << 16 | experts[part].reshape(-1))
        base += len(part)
    every = np.sort(np.concatenate(keys))  # quicker than np.unique
    distinct = every[np.append(True, every[1:] != every[:-1]) & (every & 0xFFFF != NO_EXPERT)]
    offsets = np.zeros(base + 1, dtype=np.int64)
    np.cumsum(np.bincount(distinct >> 16, minlength=base), out=offsets[1:])
    return Batches(offsets, (distinct & 0xFFFF).astype(np.uint16), mix_of)


def _unrelated(trace: Trace, size: int, count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Token numbers [count, size], nearly all of a batch of different sequences.

    Tokens in the order of their sequences, themselves shuffled, are cut into `size` equal parts, and a batch takes
    one token of each. So none comes twice before all have come: the more a plan is made from, the better.
    """
    _, place, lengths = np.unique(trace.seq, return_inverse=True, return_counts=True)
    each = max(1, trace.tokens // size)
    rows: list[npt.NDArray[np.int64]] = []
    for _ in range(-(-count // each)):
        order = np.lexsort((random.random(trace.tokens), random.permutation(len(lengths))[place]))
        order = np.resize(np.roll(order, random.integers(trace.tokens)), each * size)
        rows.append(random.permuted(order.reshape(size, each), axis=1).T)
    return np.concatenate(rows)[:count]


def _runs(trace: Trace, size: int, count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Token numbers [count, size], in a row within one sequence; short sequences are read on into the next."""
    by_sequence = np.argsort(trace.seq, kind="stable")
    start = random.integers(max(1, trace.tokens - size + 1), size=(count, 1))
    tokens: npt.NDArray[np.int64] = by_sequence[(start + np.arange(size)) % trace.tokens]
    return tokens


def save_trace(trace: Trace, path: Path) -> None:
    """Writes the file beside, then renames it. Raises OSError."""
    with whole_file(path) as file:
        np.savez_compressed(file, experts=trace.experts, seq=trace.seq)


def read_trace(path: Path) -> Trace:
    """Raises CoordinatorError when the file is missing or no trace."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_TRACE_BYTES:
                raise CoordinatorError(f"{path} is larger than the planner reads ({MAX_TRACE_BYTES >> 30} GiB).")
        with np.load(path, allow_pickle=False) as arrays:
            if missing := {"experts", "seq"} - set(arrays.files):
                raise CoordinatorError(f"{path} has no array {sorted(missing)[0]!r}.")
            experts, seq = arrays["experts"], arrays["seq"]
    except OSError as error:
        raise CoordinatorError(f"{path} can't be read: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        raise CoordinatorError(f"{path} is not a trace that numpy can read: {error}.") from error
    try:
        return Trace(experts, seq)
    except CoordinatorError as error:
        raise CoordinatorError(f"{path}: {error}") from None
