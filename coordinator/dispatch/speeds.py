"""How quick each node is now, by its own replies: what a message to it costs, and what an expert there costs.

The newest replies count most, so a node that becomes busy with something else is asked for less within a few layers.
One that is not asked any more is forgiven little by little, or nobody would notice that it is idle again.
"""

import ctypes

from ..types import NodeName
from .native import library

# Also in cpp/speeds.h.
FEW_TOKENS = 32  # up to here a request's time is that of reading experts, beyond it that of computing pairs
UNKNOWN_S_PER_BYTE = 1e-10  # 10 GB/s, until a node has answered once
UNKNOWN_PAIR_READS = 0.3  # seconds of a pair, in those of reading its expert, until a node has computed many tokens
UNHEARD = 64  # layers without a reply, after which a node is taken to be a little quicker than it was
FORGIVEN = 0.9


class NodeSpeed(ctypes.Structure):
    """One node's figures, seconds; NodeSpeed of cpp/speeds.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("s_per_byte", "s_per_pair", "best_s_per_byte", "backlog_s")),
        ("heard", ctypes.c_int64),
    )

    s_per_byte: float  # of the experts that a request of few tokens reads; 0: not known
    s_per_pair: float  # of a (token, expert) pair of a request of many tokens; 0: not known
    best_s_per_byte: float
    backlog_s: float  # expected of the requests that are not answered yet
    heard: int  # the layer, counted since the start, of the last reply

    @property
    def read_s_per_byte(self) -> float:
        """Of the experts that a request of few tokens reads, a guess until it is known."""
        return self.s_per_byte or UNKNOWN_S_PER_BYTE

    def pair_s(self, nbytes: int) -> float:
        """Of a pair of a request of many tokens whose expert has `nbytes`, a guess until it is known."""
        return self.s_per_pair or UNKNOWN_PAIR_READS * self.read_s_per_byte * nbytes

    def note(self, tokens: int, pairs: int, nbytes: int, seconds: float, now: int) -> None:
        """A reply's own computing time for `pairs` over experts of `nbytes` together."""
        library().moehive_note_node(ctypes.addressof(self), tokens, pairs, nbytes, seconds, now)

    def forgive(self, now: int) -> None:
        """Called now and then: what was slow long ago may be quick again."""
        if now - self.heard > UNHEARD:
            self.s_per_byte = max(self.best_s_per_byte, self.s_per_byte * FORGIVEN)

    def expected(self, tokens: int, pairs: int, nbytes: int) -> float | None:
        """Seconds that such a request should take to compute; None when nothing like it was answered yet."""
        if tokens > FEW_TOKENS:
            return pairs * self.s_per_pair or None
        return nbytes * self.s_per_byte or None


class Speeds:
    """All nodes' figures."""

    def __init__(self) -> None:
        self._nodes: dict[NodeName, NodeSpeed] = {}
        self.layers = 0  # since the start

    def of(self, node: NodeName) -> NodeSpeed:
        """A node's figures."""
        known = self._nodes.get(node)
        if known is None:
            known = self._nodes[node] = NodeSpeed()
        return known

    def tick(self) -> None:
        """A layer is being dispatched."""
        self.layers += 1
        if self.layers % UNHEARD == 0:
            for speed in self._nodes.values():
                speed.forgive(self.layers)
