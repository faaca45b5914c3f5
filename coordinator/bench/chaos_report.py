"""The verdict of `moehive bench chaos`. Clients' threads and the event loop write it."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ERRORS = 10  # sentences that are shown


@dataclass(slots=True)
class ChaosReport:
    """What happened; any thread may call the methods."""

    seed: int
    minutes: float
    requests: int = 0
    faults: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    differ: int = 0  # answers with other tokens than the calm run's
    lost_or_repeated: int = 0  # answers with another number of tokens
    failed: int = 0
    resent: int = 0  # requests that were on their way to a coordinator when it was killed
    longest_pause_s: float = 0.0  # without a token, over all clients
    pauses_s: dict[str, float] = field(default_factory=dict)  # the longest by `outage`, else by `latest`, at its end
    latest: str = ""  # kind of the latest fault
    outage: str = ""  # kind of the fault that has taken the coordinator away, while it lasts
    errors: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)  # processes that ended by themselves, and what they said
    leaks: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong, lost or left behind."""
        return not (self.differ or self.lost_or_repeated or self.failed or self.crashes or self.leaks)

    def asked(self) -> None:
        """A request begins."""
        with self._lock:
            self.requests += 1

    def answered(self, name: str, tokens: Sequence[int], expected: Sequence[int]) -> None:
        """Compares an answer to the request `name` with the right one, token by token."""
        with self._lock:
            if len(tokens) != len(expected):
                self.lost_or_repeated += 1
                self.errors.append(f"{name}: {len(tokens)} tokens came instead of {len(expected)}.")
                return
            places = [i for i, (one, right) in enumerate(zip(tokens, expected, strict=True)) if one != right]
            if places:
                self.differ += 1
                at = places[0]
                self.errors.append(f"{name}: token {at} is {tokens[at]} instead of {expected[at]}.")

    def failed_with(self, name: str, sentence: str) -> None:
        """`name`, a request or a part of the cluster, does not do what it should."""
        with self._lock:
            self.failed += 1
            self.errors.append(f"{name}: {sentence}")

    def sent_anew(self) -> None:
        """A request was sent again: the coordinator that it went to was killed before it had taken it."""
        with self._lock:
            self.resent += 1

    def paused(self, seconds: float) -> None:
        """A client has waited so long for a token."""
        with self._lock:
            self.longest_pause_s = max(self.longest_pause_s, seconds)
            kind = self.outage or self.latest
            self.pauses_s[kind] = max(self.pauses_s.get(kind, 0.0), seconds)

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "seed": self.seed, "minutes": self.minutes, "requests": self.requests, "faults": self.faults,
            "by_kind": dict(sorted(self.by_kind.items())), "differ": self.differ,
            "lost_or_repeated": self.lost_or_repeated, "failed": self.failed, "crashes": len(self.crashes),
            "resent": self.resent, "longest_pause_s": round(self.longest_pause_s, 3),
            "pauses_s": {kind: round(seconds, 3) for kind, seconds in sorted(self.pauses_s.items())},
            "errors": [*self.crashes, *self.errors][:ERRORS], "leaks": self.leaks, "passed": self.passed,
        }  # fmt: skip
