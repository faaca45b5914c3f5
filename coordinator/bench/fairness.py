"""Two clients at once: does a long generation starve a short one? `moehive bench fairness` runs this.

Alternates, so that a noisy machine affects both alike: a short request alone, then the same request beside a long
one. With two sequences taking turns a layer at a time, the short one should take about twice its time, and no more.
"""

import statistics
import threading
import time
from dataclasses import dataclass

from moehive.client import Client

PROMPT = tuple(range(2, 34))
LONG_TOKENS = 4000  # more than a short request can outlast; it is cancelled then


@dataclass(frozen=True, slots=True)
class FairnessReport:
    """Medians over the rounds, in seconds and tokens a second."""

    rounds: int
    short_tokens: int
    alone_s: float  # a short request with nobody else
    beside_s: float  # the same beside a long generation
    long_tokens_per_s: float  # of the long generation meanwhile

    @property
    def ratio(self) -> float:
        """How many times longer the short request takes beside the long one."""
        return self.beside_s / self.alone_s


def measure_fairness(address: str, rounds: int, short_tokens: int) -> FairnessReport:
    """Measures against the coordinator at `address` (host:port, on this machine). Raises MoehiveError."""
    alone: list[float] = []
    beside: list[float] = []
    rates: list[float] = []
    with Client(address) as client:
        _short(client, short_tokens)  # warm up
        for _ in range(rounds):
            alone.append(_short(client, short_tokens))
            with _Long(address) as long:
                start = long.tokens
                seconds = _short(client, short_tokens)
                beside.append(seconds)
                rates.append((long.tokens - start) / seconds)
    return FairnessReport(
        rounds, short_tokens, statistics.median(alone), statistics.median(beside), statistics.median(rates)
    )


def _short(client: Client, tokens: int) -> float:
    start = time.perf_counter()
    client.generate(token_ids=PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True)
    return time.perf_counter() - start


class _Long:
    """A long generation by a client of its own, from its first token to the end of the block."""

    def __init__(self, address: str) -> None:
        self.tokens = 0
        self._address = address
        self._flowing = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "_Long":
        self._thread.start()
        self._flowing.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            with Client(self._address) as client:
                pieces = client.stream(token_ids=PROMPT, max_tokens=LONG_TOKENS, temperature=0, ignore_eos=True)
                for piece in pieces:
                    self.tokens += len(piece.token_ids)
                    self._flowing.set()
                    if self._ending.is_set():
                        break
                pieces.close()
        finally:
            self._flowing.set()
