"""How long chunks of prompts take as a star and as a chain (chain.py): estimated first, then measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PIECE_SECONDS = 1e-3  # what a piece of a chunk costs each node beside its bytes' time on the link
MAX_PIECES = 32  # as many as a node has in hand of one stream
TRIALS = 3  # of each way before they are compared; the first opens the connections between the nodes
RETRY = 50  # chunks by the faster way, then one by the other; more when that was much slower
NEWEST = 0.25  # weight of a chunk among those before it


def star_seconds(row_s: float, rows: Sequence[int], read_s: float, round_trip: float) -> float:
    """Of a chunk of which each node gets so many `rows`, of `row_s` on the coordinator's link.

    Nodes' rows come back while hidden states leave to others: one message more than there are nodes. A node reads
    its experts within `read_s`.
    """
    return row_s * (sum(rows) + max(rows)) + read_s + round_trip


def chain_seconds(chunk_s: float, nodes: int, read_s: float, round_trip: float) -> float:
    """Of a chunk that takes `chunk_s` on one link, if the links between nodes are like the coordinator's.

    A node in the middle sends hidden states on and sums back; the first piece goes all the way and back. For each
    piece a node reads its experts again.
    """
    count = pieces(chunk_s, nodes, read_s)
    return 2 * chunk_s * (1 + nodes / count) + count * (PIECE_SECONDS + read_s) + nodes * round_trip


def pieces(chunk_s: float, nodes: int, read_s: float) -> int:
    """How many pieces make `chain_seconds` least: many fill the chain soon, few cost little."""
    return max(1, min(MAX_PIECES, round(math.sqrt(2 * nodes * chunk_s / (PIECE_SECONDS + read_s)))))


@dataclass(slots=True)
class Way:
    """One way's time."""

    s_per_token: float = math.inf
    trials: int = 0

    def note(self, seconds: float) -> None:
        """A chunk took `seconds` a token."""
        self.trials += 1
        if self.trials <= TRIALS:
            self.s_per_token = min(self.s_per_token, seconds)
        else:
            self.s_per_token += NEWEST * (seconds - self.s_per_token)


@dataclass(slots=True)
class Ways:
    """Both ways' times, of chunks of about one size."""

    star: Way = field(default_factory=Way)
    chain: Way = field(default_factory=Way)
    chunks: int = 0  # since the slower way was tried

    def next(self) -> Way:
        """The way of the next chunk."""
        for way in (self.star, self.chain):
            if way.trials < TRIALS:
                return way
        better, worse = sorted((self.star, self.chain), key=lambda way: way.s_per_token)
        self.chunks += 1
        if self.chunks * better.s_per_token < RETRY * worse.s_per_token:
            return better
        self.chunks = 0
        return worse


class Chunk(NamedTuple):
    """A chunk that is on its way, for what it says of its way."""

    way: Way
    tokens: int
    pieces: int  # if it goes as a chain
    sent_at: float  # seconds of the loop's clock
