"""Reads one text again and again from a cluster's engine, and keeps when each token came."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from time import perf_counter

from ..app import Coordinator
from ..changes import Changes
from ..engine.engine import Engine
from ..types import CoordinatorError, GenerationRequest, SamplingParams, Token
from .faults_report import FaultsReport

PROMPT = tuple(range(40, 56))
TEXT_TOKENS = 600  # of the calm text; whoever reads longer begins again
STEPS_AFTER = 24  # a fault's longest wait is looked for in so many tokens: by then each layer has met it
NO_TOKEN_SECONDS = 150.0  # longer than a layer waits for somebody who can compute it
AGAIN_SECONDS = 0.1  # after a text that ended with an error


@dataclass(frozen=True, slots=True)
class Step:
    """A token of a text: when it came (perf_counter), how long it was waited for, and whether others came before."""

    at: float
    seconds: float
    decode: bool


class Reader:
    """Tokens are taken at the engine: the doors add a message, and a client's thread would disturb the loop."""

    def __init__(self, coordinator: Coordinator, report: FaultsReport) -> None:
        """What is found wrong with texts goes to `report`."""
        self._engine = Engine(coordinator.trunk, coordinator.dispatcher, coordinator.kv_bytes)
        self._report = report
        self._expected: list[int] = []
        self._texts = 0
        self._changes = Changes()
        self.steps: list[Step] = []

    async def calm(self) -> None:
        """Reads what the text should be. Raises CoordinatorError."""
        events = self._engine.generate(self._request())
        self._expected = [event.id async for event in events if isinstance(event, Token)]

    async def stop(self) -> None:
        """Ends the engine."""
        await self._engine.shutdown()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Reads from the text's begin on, again and again, until the block is left."""
        task = asyncio.create_task(self._read_forever())
        try:
            yield
        finally:
            task.cancel()
            (end,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(end, Exception):
            raise end

    async def more(self, tokens: int) -> None:
        """Returns when so many further tokens have come. Raises CoordinatorError when none comes for a long time."""
        wanted = len(self.steps) + tokens
        while len(self.steps) < wanted:
            try:
                async with asyncio.timeout(NO_TOKEN_SECONDS):
                    await self._changes.next()
            except TimeoutError:
                raise CoordinatorError(f"No token came for {NO_TOKEN_SECONDS:.0f} s.") from None

    async def pause(self, fault: Callable[[], None], met: Callable[[], bool]) -> float:
        """The longest wait for a token from `fault` until STEPS_AFTER have come since it was `met`, seconds."""
        before = len(self.steps)
        start = perf_counter()
        fault()
        while not met() and perf_counter() - start < NO_TOKEN_SECONDS:
            await self.more(1)
        await self.more(STEPS_AFTER)
        return max(min(step.seconds, step.at - start) for step in self.steps[before:])

    def between(self, start: float, end: float) -> list[float]:
        """How long the decode steps took that ended within a stretch of time, seconds."""
        return [step.seconds for step in self.steps if step.decode and start <= step.at <= end]

    async def _read_forever(self) -> None:
        while True:
            try:
                await self._read()
            except CoordinatorError as error:
                self._report.errors.append(str(error))
                await asyncio.sleep(AGAIN_SECONDS)

    async def _read(self) -> None:
        """One text. One that begins as it should is not looked at further when whoever reads it leaves."""
        self._report.texts += 1
        count, last = 0, perf_counter()
        async with aclosing(self._engine.generate(self._request())) as events:
            async for event in events:
                expected = self._expected[count] if count < len(self._expected) else None
                if (event.id if isinstance(event, Token) else None) != expected:
                    self._report.differ += 1
                    return
                if isinstance(event, Token):
                    now = perf_counter()
                    self.steps.append(Step(now, now - last, count > 0))
                    count, last = count + 1, now
                    self._changes.tell()

    def _request(self) -> GenerationRequest:
        self._texts += 1
        return GenerationRequest(
            request_id=f"faults-{self._texts}",
            prompt=PROMPT,
            sampling=SamplingParams(temperature=0.0),
            max_tokens=TEXT_TOKENS,
        )
