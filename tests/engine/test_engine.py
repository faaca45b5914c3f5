"""Generations over a fake trunk: right tokens, fairness, cancellation, back-pressure, nothing leaked."""

import asyncio
import random
from contextlib import aclosing, suppress
from types import ModuleType
from typing import Any

import pytest

from moehive.coordinator.engine.engine import Engine
from moehive.coordinator.engine.sequence import MAX_UNREAD, OPEN_ENDED_TOKENS, Finished
from moehive.coordinator.types import (
    CoordinatorError,
    FinishReason,
    GenerationRequest,
    InvalidRequest,
    NodeUnavailable,
    NoRoom,
    NotReady,
    SamplingParams,
    Token,
)

GREEDY = SamplingParams(temperature=0)


def request(name: str, prompt: tuple[int, ...] = (1, 2, 3), **more: Any) -> GenerationRequest:
    more.setdefault("sampling", GREEDY)
    return GenerationRequest(request_id=name, prompt=prompt, **more)


async def collect(engine: Engine, wanted: GenerationRequest) -> tuple[list[int], Finished]:
    events = [event async for event in engine.generate(wanted)]
    assert isinstance(events[-1], Finished)
    return [event.id for event in events[:-1] if isinstance(event, Token)], events[-1]


def greedy(fakes: ModuleType, prompt: tuple[int, ...], count: int, vocab_size: int = 50) -> list[int]:
    """The obvious loop that the engine must equal."""
    history = list(prompt)
    for _ in range(count):
        history.append(int(fakes.next_logits(history, vocab_size).argmax()))
    return history[len(prompt) :]


def assert_empty(engine: Engine) -> None:
    engine.check_integrity()
    trunk: Any = engine._trunk
    assert not trunk.caches, "caches that nobody has freed"
    load = engine.load()
    assert (load.running, load.waiting, load.kv_bytes_used) == (0, 0, 0)


def test_tokens_usage_and_chunks(fakes: ModuleType) -> None:
    async def run() -> None:
        trunk = fakes.FakeTrunk(prefill_chunk=4)
        engine = Engine(trunk, fakes.FakeExperts(), 100_000)
        prompt = tuple(range(10))
        tokens, end = await collect(engine, request("a", prompt, max_tokens=5))
        assert tokens == greedy(fakes, prompt, 5)
        assert end.reason is FinishReason.LENGTH
        assert (end.prompt_tokens, end.completion_tokens) == (10, 5)
        assert end.prompt_seconds > 0 and end.decode_seconds > 0
        assert [len(step) for step in trunk.steps] == [4, 4, 2, 1, 1, 1, 1]
        assert_empty(engine)

    asyncio.run(run())


def test_many_at_once_equal_one_at_a_time(fakes: ModuleType) -> None:
    async def run() -> None:
        engine = Engine(fakes.FakeTrunk(), fakes.FakeExperts(), 1_000_000)
        prompts = [tuple(random.Random(n).choices(range(50), k=1 + 3 * n)) for n in range(12)]
        results = await asyncio.gather(
            *(collect(engine, request(str(n), prompt, max_tokens=9)) for n, prompt in enumerate(prompts))
        )
        for prompt, (tokens, _) in zip(prompts, results, strict=True):
            assert tokens == greedy(fakes, prompt, 9)
        assert_empty(engine)

    asyncio.run(run())


def test_same_seed_same_text_whatever_else_runs(fakes: ModuleType) -> None:
    async def run() -> None:
        engine = Engine(fakes.FakeTrunk(), fakes.FakeExperts(), 1_000_000)
        seeded = SamplingParams(temperature=1, top_p=0.9, seed=7)
        alone, _ = await collect(engine, request("a", max_tokens=20, sampling=seeded))
        others = [collect(engine, request(f"o{n}", (n,), max_tokens=20, sampling=SamplingParams())) for n in range(5)]
        again, *_ = await asyncio.gather(collect(engine, request("b", max_tokens=20, sampling=seeded)), *others)
        assert again[0] == alone
        different, _ = await collect(
            engine, request("c", max_tokens=20, sampling=SamplingParams(temperature=1, top_p=0.9, seed=8))
        )
        assert different != alone

    asyncio.run(run())


def test_end_of_text_and_context_end(fakes: ModuleType) -> None:
    async def run() -> None:
        engine = Engine(fakes.FakeTrunk(context_length=32, choose=lambda h: len(h)), fakes.FakeExperts(), 100_000)
        tokens, end = await collect(engine, request("a", (0,), stop_tokens=frozenset({4})))
        assert tokens == [1, 2, 3, 4] and end.reason is FinishReason.STOP
        tokens, end = await collect(engine, request("b", (0,), max_tokens=4, stop_tokens=frozenset({4})))
        assert end.reason is FinishReason.STOP, "the end-of-text token counts before the limit"
        tokens, end = await collect(engine, request("c", (0,) * 30))
        assert len(tokens) == 2 and end.reason is FinishReason.LENGTH
        tokens, end = await collect(engine, request("d", (0,) * 30, max_tokens=500))
        assert len(tokens) == 2 and end.reason is FinishReason.LENGTH

    asyncio.run(run())


def test_a_long_generation_does_not_starve_a_short_one(fakes: ModuleType) -> None:
    async def run() -> None:
        engine = Engine(fakes.FakeTrunk(context_length=4096), fakes.FakeExperts(), 10_000_000)
        long_tokens = 0
        started = asyncio.Event()

        async def long() -> None:
            nonlocal long_tokens
            async with aclosing(engine.generate(request("long", max_tokens=2000))) as events:
                async for _ in events:
                    long_tokens += 1
                    if long_tokens == 50:
                        started.set()

        task = asyncio.create_task(long())
        await started.wait()
        tokens, _ = await collect(engine, request("short", max_tokens=10))
        assert len(tokens) == 10
        assert long_tokens <= 50 + 2 * 10 + 10, "turns must alternate"
        assert engine.cancel("long")
        await task
        assert_empty(engine)

    asyncio.run(run())


def test_a_long_prompt_does_not_starve_a_running_generation(fakes: ModuleType) -> None:
    async def run() -> None:
        class Instant(fakes.FakeExperts):  # type: ignore[name-defined, misc]
            async def submit(self, layer: int, hidden: Any, ids: Any, weights: Any) -> Any:
                return hidden  # never gives the loop away itself

        trunk = fakes.FakeTrunk(context_length=4096, prefill_chunk=4)
        engine = Engine(trunk, Instant(), 10_000_000)
        async with aclosing(engine.generate(request("a", max_tokens=2000))) as events:
            await anext(events)
            long = asyncio.create_task(collect(engine, request("b", (9,) * 400, max_tokens=1)))
            seen = 0
            while not long.done():
                await anext(events)
                seen += 1
            assert seen >= 90, f"{seen} tokens came during 100 chunks of another's prompt"

    asyncio.run(run())


def test_cancel_running_and_waiting(fakes: ModuleType) -> None:
    async def run() -> None:
        experts = fakes.FakeExperts()
        engine = Engine(fakes.FakeTrunk(), experts, 100 * 60)
        seen: list[int] = []

        async def first() -> Finished:
            async for event in engine.generate(request("a", max_tokens=50)):
                if isinstance(event, Finished):
                    return event
                seen.append(event.id)
            raise AssertionError("no end")

        running = asyncio.create_task(first())
        waiting = asyncio.create_task(collect(engine, request("b", max_tokens=50)))
        await fakes.until(lambda: len(seen) >= 3 and engine.load().waiting == 1)
        assert engine.cancel("b")
        tokens, end = await waiting
        assert tokens == [] and end.reason is FinishReason.CANCELLED and end.completion_tokens == 0
        experts.gate.clear()  # in the middle of a forward pass
        await asyncio.sleep(0)
        assert engine.cancel("a")
        end = await running
        assert end.reason is FinishReason.CANCELLED and end.completion_tokens == len(seen)
        assert not engine.cancel("a") and not engine.cancel("never")
        assert_empty(engine)

    asyncio.run(run())


def test_cancel_before_the_first_step(fakes: ModuleType) -> None:
    async def run() -> None:
        engine = Engine(fakes.FakeTrunk(), fakes.FakeExperts(), 100_000)
        reader = asyncio.create_task(collect(engine, request("a", max_tokens=5)))
        await asyncio.sleep(0)  # the reader has run once, the generation's own task not at all
        assert engine.cancel("a")
        async with asyncio.timeout(5):
            tokens, end = await reader
        assert tokens == [] and end.reason is FinishReason.CANCELLED
        assert_empty(engine)

    asyncio.run(run())


def test_a_reader_that_leaves_frees_its_sequence(fakes: ModuleType) -> None:
    async def run() -> None:
        engine = Engine(fakes.FakeTrunk(), fakes.FakeExperts(), 100_000)
        async with aclosing(engine.generate(request("a", max_tokens=100))) as events:
            await anext(events)
            assert engine.load().running == 1
        assert_empty(engine)
        reader = asyncio.create_task(collect(engine, request("b", max_tokens=200)))
        await fakes.until(lambda: engine.load().running == 1)
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader
        assert_empty(engine)
        assert engine.load().failed == 0

    asyncio.run(run())


def test_one_failure_ends_one_sequence(fakes: ModuleType) -> None:
    async def run() -> None:
        experts = fakes.FakeExperts()
        engine = Engine(fakes.FakeTrunk(), experts, 100_000)
        experts.fail_at[20] = NodeUnavailable("b", "Node b is away; start it again.")
        results = await asyncio.gather(
            *(collect(engine, request(str(n), (n,), max_tokens=10)) for n in range(3)), return_exceptions=True
        )
        failed = [r for r in results if isinstance(r, BaseException)]
        assert [str(error) for error in failed] == ["Node b is away; start it again."]
        for n, result in enumerate(results):
            if not isinstance(result, BaseException):
                assert result[0] == greedy(fakes, (n,), 10)
        assert_empty(engine)
        assert engine.load().failed == 1 and engine.load().finished == 2

    asyncio.run(run())


def test_output_that_is_not_a_number_is_an_error(fakes: ModuleType) -> None:
    async def run() -> None:
        trunk = fakes.FakeTrunk()
        trunk.nan_after = 5
        engine = Engine(trunk, fakes.FakeExperts(), 100_000)
        seen = []
        with pytest.raises(CoordinatorError, match="not a number"):
            async for event in engine.generate(request("a", max_tokens=10)):
                seen.append(event)
        assert len(seen) == 2
        assert_empty(engine)

    asyncio.run(run())


def test_a_slow_reader_holds_back_only_itself(fakes: ModuleType) -> None:
    async def run() -> None:
        trunk = fakes.FakeTrunk()
        engine = Engine(trunk, fakes.FakeExperts(), 1_000_000)
        async with aclosing(engine.generate(request("slow", max_tokens=200))) as events:
            await anext(events)
            tokens, _ = await collect(engine, request("quick", (5,), max_tokens=100))
            assert tokens == greedy(fakes, (5,), 100)
            made = engine.load().generated_tokens - 100
            assert made <= MAX_UNREAD + 2
            rest = [event async for event in events]
            assert len(rest) == 200
        assert_empty(engine)

    asyncio.run(run())


def test_duplicate_id(fakes: ModuleType) -> None:
    async def run() -> None:
        engine = Engine(fakes.FakeTrunk(), fakes.FakeExperts(), 100_000)
        async with aclosing(engine.generate(request("a", max_tokens=100))) as events:
            await anext(events)
            with pytest.raises(InvalidRequest) as caught:
                await collect(engine, request("a", max_tokens=1))
            assert caught.value.parameter == "request_id"
            await anext(events)  # the first one goes on
        tokens, _ = await collect(engine, request("a", max_tokens=1))
        assert len(tokens) == 1

    asyncio.run(run())


def test_shutdown_ends_all_with_a_sentence(fakes: ModuleType) -> None:
    async def run() -> None:
        experts = fakes.FakeExperts()
        experts.gate.clear()
        engine = Engine(fakes.FakeTrunk(), experts, 100 * 60)
        readers = [asyncio.create_task(collect(engine, request(str(n), max_tokens=50))) for n in range(3)]
        await fakes.until(lambda: engine.load().running == 1 and engine.load().waiting == 2)
        await engine.shutdown()
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(result, NotReady) and "stopping" in str(result)
        with pytest.raises(NotReady):
            await collect(engine, request("late"))
        assert_empty(engine)

    asyncio.run(run())


def test_room(fakes: ModuleType) -> None:
    async def run() -> None:
        experts = fakes.FakeExperts()
        engine = Engine(fakes.FakeTrunk(), experts, 100 * 100, max_waiting=1)
        with pytest.raises(NoRoom, match=r"20.3 kB of KV cache.*10.0 kB"):
            await collect(engine, request("large", max_tokens=200))
        async with aclosing(engine.generate(request("a", max_tokens=90))) as events:
            await anext(events)
            assert engine.load().kv_bytes_used == 9300
            waiting = asyncio.create_task(collect(engine, request("b", max_tokens=10)))
            await fakes.until(lambda: engine.load().waiting == 1)
            with pytest.raises(NoRoom, match=r"1.3 kB of KV cache, 700 bytes are free and 1 generations wait"):
                await collect(engine, request("c", max_tokens=10))
        tokens, _ = await waiting
        assert len(tokens) == 10
        assert_empty(engine)

    asyncio.run(run())


def test_an_open_ended_request_grows_while_there_is_room(fakes: ModuleType) -> None:
    async def run() -> None:
        trunk = fakes.FakeTrunk(context_length=2 * OPEN_ENDED_TOKENS, layers=1, choose=lambda h: 1)
        engine = Engine(trunk, fakes.FakeExperts(), 100 * (2 * OPEN_ENDED_TOKENS + 53))
        tokens, end = await collect(engine, request("a"))
        assert len(tokens) == 2 * OPEN_ENDED_TOKENS - 3, "alone it goes on to the context's end"
        async with aclosing(engine.generate(request("b", max_tokens=OPEN_ENDED_TOKENS))) as other:
            await anext(other)
            tokens, end = await collect(engine, request("c"))
            assert len(tokens) == OPEN_ENDED_TOKENS and end.reason is FinishReason.LENGTH
        assert_empty(engine)

    asyncio.run(run())


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_random_cancels_leak_nothing(fakes: ModuleType, seed: int, most: int) -> None:
    async def run() -> None:
        chance = random.Random(seed)
        experts = fakes.FakeExperts()
        engine = Engine(fakes.FakeTrunk(prefill_chunk=3, max_sequences=most), experts, 100 * 90, max_waiting=12)

        async def client(n: int) -> None:
            for _ in range(chance.randrange(60)):
                await asyncio.sleep(0)
            prompt = tuple(chance.choices(range(50), k=chance.randrange(1, 12)))
            wanted = request(str(n), prompt, max_tokens=chance.choice([1, 5, 30, 60, 200]))
            leave_after = chance.choice([0, 1, 4, 1000])
            with suppress(NoRoom, NodeUnavailable):
                async with aclosing(engine.generate(wanted)) as events:
                    count = 0
                    async for _ in events:
                        count += 1
                        engine.check_integrity()
                        if count > leave_after:
                            return

        for number in chance.sample(range(1000), 8):
            experts.fail_at[number] = NodeUnavailable("x", "Node x is away.")
        readers = [asyncio.create_task(client(n)) for n in range(60)]
        while not all(reader.done() for reader in readers):
            await asyncio.sleep(0)
            match chance.randrange(6):
                case 0:
                    engine.cancel(str(chance.randrange(60)))
                case 1:
                    chance.choice(readers).cancel()
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError), result
        assert_empty(engine)
        experts.fail_at.clear()
        tokens, _ = await collect(engine, request("after", (3,), max_tokens=80))
        assert tokens == greedy(fakes, (3,), 80)

    asyncio.run(run())
