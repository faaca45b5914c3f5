"""The load of `moehive bench chaos`: clients that ask one thing after the other and know the right answers."""

import random
import threading
import time
from collections.abc import Callable, Iterator

from moehive.client import Client, MoehiveError

from .chaos_report import ChaosReport

CLIENTS = 4
PROMPTS, PROMPT_TOKENS, TOKENS = 8, 12, 32
REQUEST_SECONDS = 240.0  # for an answer; only a cluster that does not come back takes longer
RETRY_SECONDS = 0.2


class Clients:
    """CLIENTS threads from `start` to `stop`; their answers are compared with those of `learn`."""

    def __init__(self, address: str, seed: int, report: ChaosReport, kills: Callable[[], int]) -> None:
        """`kills`: how often the coordinator at `address` has been killed so far."""
        self._address = address
        self._report = report
        self._kills = kills
        self._over = threading.Event()
        self._expected: list[list[int]] = []
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed * CLIENTS + number),), daemon=True)
            for number in range(CLIENTS)
        ]

    def learn(self) -> None:
        """Asks the calm cluster everything once. Raises MoehiveError."""
        with Client(self._address) as client:
            for number in range(PROMPTS):
                self._expected.append([token for _, ids in _ask(client, number, time.monotonic()) for token in ids])

    def check(self) -> None:
        """Asks the calm cluster everything again; the answers must be the same."""
        with Client(self._address) as client:
            for number in range(PROMPTS):
                self._compare(client, number, f"prompt {number} after the storm")

    def start(self) -> None:
        """Begins to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when the last answers are here."""
        self._over.set()
        end = time.monotonic() + 2 * REQUEST_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                self._report.failed_with("a client", "It waits for ever.")

    def _run(self, choice: random.Random) -> None:
        with Client(self._address) as client:
            while not self._over.is_set():
                number = choice.randrange(PROMPTS)
                self._compare(client, number, f"prompt {number}")

    def _compare(self, client: Client, number: int, name: str) -> None:
        self._report.asked()
        try:
            tokens = self._answer(client, number)
        except MoehiveError as error:
            self._report.failed_with(name, str(error))
        else:
            self._report.answered(name, tokens, self._expected[number])

    def _answer(self, client: Client, number: int) -> list[int]:
        """The answer of a coordinator that is there now or soon. Raises MoehiveError.

        A coordinator that is killed before it has taken a request can't know of it; then it is sent anew.
        """
        since = time.monotonic()
        while True:
            kills = self._kills()
            try:
                client.status()
            except MoehiveError:
                if time.monotonic() - since > REQUEST_SECONDS:
                    raise
                time.sleep(RETRY_SECONDS)
                continue
            tokens: list[int] = []
            try:
                for waited, token_ids in _ask(client, number, since):
                    self._report.paused(waited)
                    tokens += token_ids
                return tokens
            except MoehiveError as error:
                if tokens or error.code != "UNAVAILABLE" or self._kills() == kills:
                    raise
                self._report.sent_anew()


def _ask(client: Client, number: int, since: float) -> Iterator[tuple[float, list[int]]]:
    """The answer to one of PROMPTS prompts, half of them sampled: its tokens, and how long they were waited for.

    `since`: the time, as `time.monotonic` has it, from which the first ones are.
    """
    prompt = [3 + (number * 31 + i * 7) % 120 for i in range(PROMPT_TOKENS)]
    for piece in client.stream(
        token_ids=prompt, max_tokens=TOKENS, temperature=0.0 if number % 2 else 0.8, seed=number, ignore_eos=True,
        timeout=REQUEST_SECONDS,
    ):  # fmt: skip
        now = time.monotonic()
        yield now - since, piece.token_ids
        since = now
