"""Which sequences share a pass: batches form, two micro-batches only where they pay, nobody disturbs another."""

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from moehive.coordinator.engine.batches import Batches
from moehive.coordinator.engine.engine import Engine
from moehive.coordinator.engine.sequence import Finished
from moehive.coordinator.models.base import SequenceInput
from moehive.coordinator.types import FinishReason, GenerationRequest, NodeUnavailable, SamplingParams, Token

DEADLINE = 20


async def collect(engine: Engine, name: str, prompt: tuple[int, ...], count: int) -> tuple[list[int], Finished]:
    request = GenerationRequest(
        request_id=name, prompt=prompt, max_tokens=count, sampling=SamplingParams(temperature=0)
    )
    events = [event async for event in engine.generate(request)]
    assert isinstance(events[-1], Finished)
    return [event.id for event in events[:-1] if isinstance(event, Token)], events[-1]


def greedy(fakes: ModuleType, prompt: tuple[int, ...], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(int(fakes.next_logits(history, 50).argmax()))
    return history[len(prompt) :]


@pytest.mark.parametrize("most", [2, 3, 8])
def test_text_does_not_depend_on_who_else_is_in_the_batch(fakes: ModuleType, most: int) -> None:
    async def run() -> None:
        trunk = fakes.FakeTrunk(max_sequences=most, prefill_chunk=5)
        engine = Engine(trunk, fakes.FakeExperts(), 1_000_000)
        prompts = [tuple(range(n, 2 * n + 1)) for n in range(9)]
        results = await asyncio.gather(*(collect(engine, str(n), p, 20 + n) for n, p in enumerate(prompts)))
        for n, (tokens, end) in enumerate(results):
            assert tokens == greedy(fakes, prompts[n], 20 + n)
            assert end.reason is FinishReason.LENGTH
        assert max(trunk.batches) >= min(most, 4), "they went through together"
        engine.check_integrity()
        assert not trunk.caches

    asyncio.run(run())


def test_those_that_are_ready_share_a_pass(fakes: ModuleType) -> None:
    async def run() -> None:
        trunk = fakes.FakeTrunk(max_sequences=8)
        engine = Engine(trunk, fakes.FakeExperts(), 1_000_000)
        await asyncio.gather(*(collect(engine, str(n), (n,), 10) for n in range(4)))
        assert trunk.batches == [4] * 10

    asyncio.run(run())


def test_a_prompt_goes_alone(fakes: ModuleType) -> None:
    async def run() -> None:
        trunk = fakes.FakeTrunk(max_sequences=8, prefill_chunk=8)
        engine = Engine(trunk, fakes.FakeExperts(), 1_000_000)
        await asyncio.gather(*(collect(engine, str(n), (n,) * 12, 1) for n in range(5)))
        assert sorted(map(len, trunk.steps)) == [4] * 5 + [8] * 5
        assert trunk.batches == [1] * 10, "the bits of many rows' products may depend on their number"

    asyncio.run(run())


def test_a_prompt_does_not_stop_those_that_decode(fakes: ModuleType) -> None:
    async def run() -> None:
        trunk = fakes.FakeTrunk(context_length=4096, prefill_chunk=4, max_sequences=4)
        engine = Engine(trunk, fakes.FakeExperts(), 10_000_000)
        decoding = [asyncio.create_task(collect(engine, str(n), (n,), 400)) for n in range(3)]
        await fakes.until(lambda: engine.load().generated_tokens > 30)
        before = engine.load().generated_tokens
        await collect(engine, "long", (7,) * 400, 1)
        assert engine.load().generated_tokens - before >= 3 * 80, "100 pieces of the prompt went along"
        for task in decoding:
            task.cancel()
        await asyncio.wait(decoding)
        engine.check_integrity()
        assert not trunk.caches

    asyncio.run(run())


def test_an_error_ends_the_sequences_of_its_batch_only(fakes: ModuleType) -> None:
    async def run() -> None:
        experts = fakes.FakeExperts()
        trunk = fakes.FakeTrunk(max_sequences=2)
        engine = Engine(trunk, experts, 1_000_000)
        experts.fail_at[40] = NodeUnavailable("b", "Node b is away; start it again.")
        results = await asyncio.gather(*(collect(engine, str(n), (n,), 20) for n in range(4)), return_exceptions=True)
        failed = [result for result in results if isinstance(result, BaseException)]
        assert [str(error) for error in failed] == ["Node b is away; start it again."] * 2
        for n, result in enumerate(results):
            if not isinstance(result, BaseException):
                assert result[0] == greedy(fakes, (n,), 20)
        assert engine.load().failed == 2 and not trunk.caches
        engine.check_integrity()

    asyncio.run(run())


def test_cancelling_one_leaves_the_others_of_its_batch(fakes: ModuleType) -> None:
    async def run() -> None:
        experts = fakes.FakeExperts()
        trunk = fakes.FakeTrunk(max_sequences=4)
        engine = Engine(trunk, experts, 1_000_000)
        readers = [asyncio.create_task(collect(engine, str(n), (n,), 30)) for n in range(3)]
        await fakes.until(lambda: engine.load().generated_tokens >= 15)
        experts.gate.clear()
        for _ in range(50):
            await asyncio.sleep(0)  # the pass has come to where it waits
        assert engine.cancel("1")
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(trunk.caches) == 3, "its cache stays while the pass writes to it"
        experts.gate.set()
        (first, _), (cancelled, end), (last, _) = await asyncio.gather(*readers)
        assert end.reason is FinishReason.CANCELLED
        assert cancelled == greedy(fakes, (1,), len(cancelled))
        assert first == greedy(fakes, (0,), 30) and last == greedy(fakes, (2,), 30)
        assert not trunk.caches
        engine.check_integrity()

    asyncio.run(run())


def test_a_pass_that_nobody_wants_is_cancelled(fakes: ModuleType) -> None:
    async def run() -> None:
        experts = fakes.FakeExperts()
        trunk = fakes.FakeTrunk(max_sequences=4)
        engine = Engine(trunk, experts, 1_000_000)
        readers = [asyncio.create_task(collect(engine, str(n), (n,), 30)) for n in range(3)]
        await fakes.until(lambda: engine.load().generated_tokens >= 15)
        experts.gate.clear()  # for good: only cancellation ends the pass
        await fakes.until(lambda: engine.load().running == 3)
        async with asyncio.timeout(DEADLINE):
            for n in range(3):
                assert engine.cancel(str(n))
            ends = await asyncio.gather(*readers)
        assert all(end.reason is FinishReason.CANCELLED for _, end in ends)
        assert not trunk.caches
        engine.check_integrity()

    asyncio.run(run())


class Clock(selectors.SelectSelector):
    """Time of a made-up loop: where a loop would sleep, its clock is put forward, whatever the machine does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)


class TimedTrunk:
    """Computes and waits for made-up times: eight layers; `compute` and `wait` say milliseconds for a batch."""

    max_sequences = 8
    prefill_chunk = 64

    def __init__(self, clock: Clock, compute: Callable[[int], float], wait: Callable[[int], float]) -> None:
        self._clock, self._compute, self._wait = clock, compute, wait

    async def forward(self, batch: Sequence[SequenceInput], experts: object) -> list[torch.Tensor]:
        for _ in range(8):
            self._clock.now += self._compute(len(batch)) / 1000
            await asyncio.sleep(self._wait(len(batch)) / 1000)
        return [torch.zeros(1)] * len(batch)


def rate(
    compute: Callable[[int], float], wait: Callable[[int], float], passes: int | None, sequences: int = 4
) -> float:
    """Tokens a second of made-up time, over 20 s; `passes` fixes the number of micro-batches."""
    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now  # type: ignore[method-assign]
    trunk: Any = TimedTrunk(clock, compute, wait)
    made = 0

    async def sequence(batches: Batches) -> None:
        nonlocal made
        cache = object()
        while clock.now < 20:
            await batches.forward(SequenceInput(torch.zeros(1, dtype=torch.int64), cache))
            made += 1

    async def run() -> None:
        batches = Batches(trunk, trunk)
        if passes is not None:
            batches._micro_batches.passes = lambda sequences: passes  # type: ignore[method-assign]
        await asyncio.gather(*(sequence(batches) for _ in range(sequences)))

    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    return made / 20


@pytest.mark.parametrize(
    ("compute", "wait", "gain"),  # milliseconds for a batch of n; two micro-batches' rate by one batch's
    [
        (lambda n: 1.0 * n, lambda n: 2.0, 1.5),
        (lambda n: 0.4 + 0.1 * n, lambda n: 0.6 + 0.3 * n, 1.44),
        (lambda n: 1.0, lambda n: 2.0, 1.0),
        (lambda n: 2.0, lambda n: 0.0, 0.5),
    ],
)
def test_two_micro_batches_only_where_they_pay(
    compute: Callable[[int], float], wait: Callable[[int], float], gain: float
) -> None:
    one, two, chosen = (rate(compute, wait, passes) for passes in (1, 2, None))
    assert two / one == pytest.approx(gain, rel=0.02)
    assert chosen >= 0.95 * max(one, two)


def test_all_wait_their_turn_when_there_are_more_than_fit(fakes: ModuleType) -> None:
    async def run() -> list[int]:
        trunk = fakes.FakeTrunk(max_sequences=2)
        batches = Batches(trunk, fakes.FakeExperts())
        made = [0] * 7

        async def sequence(n: int) -> None:
            cache = trunk.new_cache()
            while sum(made) < 700:
                await batches.forward(SequenceInput(torch.tensor([n]), cache))
                made[n] += 1

        waiting: list[Awaitable[None]] = [sequence(n) for n in range(7)]
        await asyncio.wait_for(asyncio.gather(*waiting), DEADLINE)
        return made

    made = asyncio.run(run())
    assert max(made) - min(made) <= 2
