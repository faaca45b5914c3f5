"""Copies rest while requests are answered, and only then."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from moehive.proto import pacing
from moehive.proto.pacing import Pace


async def source(count: int) -> AsyncGenerator[int]:
    for number in range(count):
        yield number


@pytest.mark.parametrize(
    ("busy", "receiver", "share"),
    [
        (False, "192.0.2.1", None),
        (True, "192.0.2.1", pacing.SHARE),
        (True, "fe80::1%eth0", pacing.SHARE),
        (True, "", pacing.SHARE),
        (True, "127.0.0.1", pacing.NEAR_SHARE),
        (True, "::1", pacing.NEAR_SHARE),
    ],
)
def test_chunks_pass_unchanged_and_rest_in_proportion(
    busy: bool, receiver: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, rests = [0.0], list[float]()

    async def sleep(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(pacing, "monotonic", lambda: clock[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def main() -> list[int]:
        passed = []
        async for chunk in Pace(lambda: busy).chunks(source(100), receiver):
            passed.append(chunk)
            clock[0] += 0.125
        return passed

    assert asyncio.run(main()) == list(range(100))
    if share is None:
        assert rests == []
        return
    assert rests[0] == pacing.FIRST_SECONDS / share  # before anything is sent
    assert rests == sorted(rests)
    assert rests[-1] == pytest.approx(0.125 / share, rel=0.01)


def test_one_chunk_that_took_long_is_made_up_for_by_many_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rests = [0.0], list[float]()

    async def sleep(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(pacing, "monotonic", lambda: clock[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def main() -> None:
        async for chunk in Pace(lambda: True).chunks(source(200), "192.0.2.1"):
            clock[0] += 90.0 if chunk == 100 else pacing.FIRST_SECONDS

    asyncio.run(main())
    usual = pacing.FIRST_SECONDS / pacing.SHARE
    assert max(rests) < pacing.LONGEST_REST / 4
    assert sum(rests) - 201 * usual == pytest.approx(pacing.LONGEST_REST, rel=0.01)


def test_loads_begin_one_after_the_other_while_requests_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[str]()

    async def sleep(seconds: float) -> None:
        order.append("wait")

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def main(busy: bool) -> None:
        pace = Pace(lambda: busy)

        async def load(name: str) -> None:
            await pace.begin()
            order.append(name)

        await asyncio.gather(load("a"), load("b"))

    asyncio.run(main(busy=False))
    assert order == ["a", "b"]
    order.clear()
    asyncio.run(main(busy=True))
    assert order == ["wait", "a", "wait", "b"]


def test_a_stream_that_is_left_closes_its_source() -> None:
    closed = []

    async def watched() -> AsyncGenerator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    async def main() -> None:
        chunks: Any = Pace(lambda: False).chunks(watched(), "192.0.2.1")
        async for _ in chunks:
            break
        await chunks.aclose()

    asyncio.run(main())
    assert closed == [True]
